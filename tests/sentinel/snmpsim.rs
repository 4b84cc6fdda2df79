//! snmpsim, for walks that are longer than any agent of this machine has.

use std::collections::BTreeMap;

use crate::peers::Peer;
use crate::process::Sentinel;

const INTERFACES: u32 = 5000;

#[test]
fn a_walk_of_many_thousand_rows_gives_each_of_them() {
    let mut rows = "1.3.6.1.2.1.1.5.0|4|walker\n".to_string();
    for n in 1..=INTERFACES {
        rows.push_str(&format!("1.3.6.1.2.1.2.2.1.2.{n}|4|port {n}\n"));
    }
    for n in 1..=INTERFACES {
        rows.push_str(&format!("1.3.6.1.2.1.2.2.1.4.{n}|2|{}\n", 1000 + n));
    }
    let Some(agent) = Peer::snmpsim(&rows) else { return };
    let port = agent.address.rsplit_once(':').unwrap().1;
    let task = |id: &str, version: &str| {
        format!(
            "[[task]]\nid = \"{id}\"\nplugin = \"snmp\"\ninterval_ms = 600000\ntimeout_ms = 240000\nlabels = {{ way = \"{id}\" }}\n\
             device = {{ host = \"127.0.0.1\", port = {port}, version = \"{version}\", community = \"public\" }}\n\
             [task.config]\ntables = [{{ columns = [\
             {{ oid = \"1.3.6.1.2.1.2.2.1.2\", name = \"interface\", type = \"label\", convert = \"text\" }}, \
             {{ oid = \"1.3.6.1.2.1.2.2.1.4\", name = \"interface_mtu\" }}] }}]\n"
        )
    };
    let config = "[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n".to_string();
    let sentinel = Sentinel::new(&(config + &task("bulk", "2c")));
    let text = String::from_utf8(sentinel.command("test").stdout).unwrap();
    let seen: BTreeMap<String, f64> = text
        .lines()
        .filter(|line| line.starts_with("interface_mtu{"))
        .map(|line| {
            let interface = line.split("interface=\"").nth(1).unwrap().split('"').next().unwrap();
            (interface.to_string(), line.rsplit(' ').nth(1).unwrap().parse().unwrap())
        })
        .collect();
    let expected = (1..=INTERFACES).map(|n| (format!("port {n}"), f64::from(1000 + n)));
    assert_eq!(seen, expected.collect(), "{:.2000}", text);
}
