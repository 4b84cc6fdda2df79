//! net-snmp's agent, asked in every version of the protocol.

use std::collections::BTreeMap;

use crate::peers::Peer;
use crate::process::Sentinel;

/// Version, authentication, privacy.
const USERS: [(&str, &str); 5] =
    [("md5", "none"), ("sha", "aes"), ("sha256", "aes"), ("sha512", "aes"), ("sha224", "none")];

fn task(id: &str, port: &str, device: &str) -> String {
    format!(
        "[[task]]\nid = \"{id}\"\nplugin = \"snmp\"\ninterval_ms = 60000\nlabels = {{ way = \"{id}\" }}\n\
         device = {{ host = \"127.0.0.1\", port = {port}, {device} }}\n\
         [task.config]\nfields = [{{ oid = \"1.3.6.1.2.1.1.5.0\", name = \"sys_name\", type = \"info\", convert = \"text\" }}]\n\
         tables = [{{ columns = [\
         {{ oid = \"1.3.6.1.2.1.2.2.1.2\", name = \"interface\", type = \"label\", convert = \"text\" }}, \
         {{ oid = \"1.3.6.1.2.1.2.2.1.4\", name = \"interface_mtu\" }}] }}]\n"
    )
}

/// What this machine says of its interfaces.
fn mtus() -> BTreeMap<String, f64> {
    let directory = std::fs::read_dir("/sys/class/net").unwrap();
    directory
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let mtu = std::fs::read_to_string(entry.path().join("mtu")).ok()?;
            Some((entry.file_name().into_string().unwrap(), mtu.trim().parse().unwrap()))
        })
        .collect()
}

#[test]
fn a_real_snmpd_gives_its_values_and_tables_in_every_version() {
    let mut config = "rocommunity public\n".to_string();
    for (auth, privacy) in USERS {
        let level = if privacy == "none" { "auth" } else { "priv" };
        let privacy =
            if privacy == "none" { String::new() } else { format!(" {} privacy-word", privacy.to_uppercase()) };
        let net_snmp = auth.to_uppercase().replace("SHA2", "SHA-2").replace("SHA5", "SHA-5");
        config.push_str(&format!("createUser {auth} {net_snmp} auth-word{privacy}\nrouser {auth} {level}\n"));
    }
    let Some(snmpd) = Peer::snmpd(&config) else { return };
    let port = snmpd.address.rsplit_once(':').unwrap().1.to_string();
    let mut tasks = String::from("[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n");
    let mut ways = vec!["v1".to_string(), "v2c".to_string()];
    tasks.push_str(&task("v1", &port, "version = \"1\""));
    tasks.push_str(&task("v2c", &port, "version = \"2c\", community = \"public\""));
    for (auth, privacy) in USERS {
        let device = format!(
            "version = \"3\", user = \"{auth}\", auth_protocol = \"{auth}\", auth_password = \"auth-word\", \
             privacy_protocol = \"{privacy}\", privacy_password = \"{}\"",
            if privacy == "none" { "" } else { "privacy-word" }
        );
        ways.push(auth.to_string());
        tasks.push_str(&task(auth, &port, &device));
    }
    // A wrong password is told from a silent device, and is in no message.
    tasks.push_str(&task(
        "wrong",
        &port,
        "version = \"3\", user = \"sha\", auth_protocol = \"sha\", auth_password = \"swordfish\"",
    ));
    let sentinel = Sentinel::new(&tasks);
    let output = sentinel.command("test");
    let text = String::from_utf8(output.stdout).unwrap();
    let mtus = mtus();
    for way in &ways {
        let of = |name: &str| -> Vec<&str> {
            let label = format!("way=\"{way}\"");
            text.lines().filter(|line| line.starts_with(name) && line.contains(&label)).collect()
        };
        let name = of("sys_name");
        assert!(name.len() == 1 && name[0].contains("\"peer\""), "{way}: {name:?} in\n{text}");
        let seen: BTreeMap<String, f64> = of("interface_mtu")
            .iter()
            .map(|line| {
                let interface = line.split("interface=\"").nth(1).unwrap().split('"').next().unwrap();
                let (rest, _) = line.rsplit_once(' ').unwrap();
                (interface.to_string(), rest.rsplit_once(' ').unwrap().1.parse().unwrap())
            })
            .collect();
        assert_eq!(seen, mtus, "{way}");
    }
    let wrong = text.lines().find(|line| line.starts_with("# wrong:")).unwrap();
    assert!(wrong.contains("Failed") && wrong.contains("password"), "{wrong}");
    assert!(!text.contains("swordfish") && !String::from_utf8(output.stderr).unwrap().contains("swordfish"));
}
