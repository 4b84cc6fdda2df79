//! A sandbox's network as requests and replies write it: `network=on|off`, `allow=` and `deny=` with ranges of IPv4
//! addresses, several by commas or by repetition.

use std::collections::BTreeSet;

use crate::network::cidr::Cidr;
use crate::network::policy::Policy;
use crate::wire::{Args, Code, Error, Fields};

fn bad(argument: &str, message: impl Into<String>) -> Error {
    Error::new(Code::BadArgument, message).with("argument", argument)
}

/// Takes a policy from a request's arguments; `None` where they name none.
pub fn take(args: &mut Args) -> Result<Option<Policy>, Error> {
    let network = args.text("network")?;
    let (allow, deny) = (ranges(args, "allow")?, ranges(args, "deny")?);
    let given = [("allow", &allow), ("deny", &deny)].into_iter().find(|(_, list)| !list.is_empty());
    match (network.as_deref(), given) {
        (Some("on"), _) => Policy::on(allow, deny)
            .map(Some)
            .map_err(|error| bad(error.list, format!("{}={}", error.list, error.message))),
        (Some("off") | None, Some((list, _))) => Err(bad(list, format!("{list} has a meaning with network=on only"))),
        (Some("off"), None) => Ok(Some(Policy::off())),
        (None, None) => Ok(None),
        (Some(other), _) => Err(bad("network", format!("network={other} is neither on nor off"))),
    }
}

fn ranges(args: &mut Args, key: &'static str) -> Result<BTreeSet<Cidr>, Error> {
    let mut found = BTreeSet::new();
    for value in args.all(key) {
        let value = String::from_utf8(value).map_err(|_| bad(key, format!("{key} is not UTF-8")))?;
        for range in value.split(',') {
            found.insert(range.parse().map_err(|why| bad(key, format!("{key}={why}")))?);
        }
    }
    Ok(found)
}

/// The policy as fields of a reply; `None` is a sandbox without a network device.
pub fn fields(policy: Option<&Policy>, fields: Fields) -> Fields {
    let Some(policy) = policy else { return fields.with("network", "off") };
    let fields = fields.with("network", word(policy));
    let fields = policy.allow().fold(fields, |fields, range| fields.with("allow", range));
    policy.deny().fold(fields, |fields, range| fields.with("deny", range))
}

/// `on` or `off`.
pub fn word(policy: &Policy) -> &'static str {
    if policy.on { "on" } else { "off" }
}

/// The policy that the state database holds in three parts. `None` where it is none that Warren writes.
pub fn of_row(network: &str, allow: &[String], deny: &[String]) -> Option<Policy> {
    let list = |texts: &[String]| texts.iter().map(|text| text.parse().ok()).collect::<Option<BTreeSet<Cidr>>>();
    match network {
        "on" => Policy::on(list(allow)?, list(deny)?).ok(),
        "off" => Some(Policy::off()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request;

    fn of(keys: &[(&str, &str)]) -> Result<Option<Policy>, Error> {
        let request = keys.iter().fold(Request::new("1", "sandbox.update"), |r, (key, value)| r.set(key, *value));
        let mut args = Args::of(request);
        let policy = take(&mut args)?;
        args.finish().map(|()| policy)
    }

    #[test]
    fn lists_come_by_commas_and_by_repetition() {
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[("network", "off")]), Ok(Some(Policy::off())));
        let policy =
            of(&[("network", "on"), ("allow", "1.0.0.0/8,2.2.2.2"), ("allow", "3.0.0.0/8"), ("deny", "1.2.0.0/16")]);
        let policy = policy.unwrap().unwrap();
        let shown = fields(Some(&policy), Fields::new());
        let all: Vec<String> = shown.0.iter().map(|(k, v)| format!("{k}={}", String::from_utf8_lossy(v))).collect();
        assert_eq!(all.join(" "), "network=on allow=1.0.0.0/8 allow=2.2.2.2/32 allow=3.0.0.0/8 deny=1.2.0.0/16");
        let texts = |list: Vec<Cidr>| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let (allow, deny) = (texts(policy.allow().collect()), texts(policy.deny().collect()));
        assert_eq!(of_row("on", &allow, &deny), Some(policy));
        assert_eq!(of_row("maybe", &[], &[]), None);
    }

    #[test]
    fn what_cannot_be_names_its_argument() {
        for (keys, argument, part) in [
            (&[("network", "yes")][..], "network", "neither on nor off"),
            (&[("allow", "1.1.1.1")], "allow", "with network=on only"),
            (&[("network", "off"), ("deny", "1.1.1.1")], "deny", "with network=on only"),
            (&[("network", "on"), ("allow", "1.1.1.1,")], "allow", "neither an IPv4 address"),
            (&[("network", "on"), ("deny", "::/0")], "deny", "neither an IPv4 address"),
            (&[("network", "on"), ("allow", "192.168.0.0/24")], "allow", "RFC 1918"),
        ] {
            let error = of(keys).unwrap_err();
            assert!(error.is(Code::BadArgument) && error.message.contains(part), "{keys:?}: {error}");
            assert_eq!(error.fields.get("argument"), Some(argument));
        }
    }
}
