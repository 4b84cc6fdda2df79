//! pymodbus' server, asked in both framings.

use crate::peers::Peer;
use crate::process::Sentinel;

/// Name, table, address, type, order, and what is to come of it.
const POINTS: [(&str, &str, u32, &str, &str, f64); 9] = [
    ("first", "holding", 0, "uint16", "abcd", 0.0),
    ("far", "holding", 2999, "uint16", "abcd", 2999.0),
    ("wide", "holding", 258, "uint32", "abcd", 16_908_547.0), // 0x0102 0x0103
    ("swapped", "holding", 258, "uint32", "cdab", 16_974_082.0), // 0x0103 0x0102
    ("little", "holding", 258, "uint32", "dcba", 50_397_697.0), // 0x03010201
    ("negative", "input", 1, "int16", "abcd", -2.0),
    ("long", "input", 0, "int64", "abcd", -4_295_098_372.0), // 0xffff 0xfffe 0xfffd 0xfffc
    ("coil", "coil", 999, "bit", "abcd", 1.0),
    ("discrete", "discrete", 999, "bit", "abcd", 0.0),
];

fn asks(framing: &str, framer: &str) {
    let Some(server) = Peer::pymodbus(framer) else { return };
    let port = server.address.rsplit_once(':').unwrap().1;
    let point = |(name, table, address, kind, order, _): &(&str, &str, u32, &str, &str, f64)| {
        format!(
            "{{ name = \"{name}\", table = \"{table}\", address = {address}, type = \"{kind}\", order = \"{order}\" }}"
        )
    };
    let points: Vec<String> = POINTS.iter().map(point).collect();
    let task = |id: &str, unit: u8, registers: &str| {
        format!(
            "[[task]]\nid = \"{id}\"\nplugin = \"modbus\"\ninterval_ms = 60000\n\
             device = {{ host = \"127.0.0.1\", port = {port}, unit = {unit}, framing = \"{framing}\" }}\n\
             [task.config]\nregisters = [{registers}]\n"
        )
    };
    let config = "[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n".to_string()
        + &task("all", 7, &points.join(", "))
        + &task("beyond", 7, "{ name = \"beyond\", address = 4000 }");
    let sentinel = Sentinel::new(&config);
    let text = String::from_utf8(sentinel.command("test").stdout).unwrap();
    for (name, .., expected) in POINTS {
        let found = text.lines().find(|line| line.split(['{', ' ']).next() == Some(name));
        let value = found.and_then(|line| line.rsplit(' ').nth(1)).and_then(|value| value.parse::<f64>().ok());
        assert_eq!(value, Some(expected), "{framing}, {name} in\n{text}");
    }
    let beyond = text.lines().find(|line| line.starts_with("# beyond:")).unwrap();
    assert!(beyond.contains("Failed") && beyond.contains("address"), "{beyond}");
}

#[test]
fn a_real_modbus_server_gives_its_values_over_tcp() {
    asks("tcp", "ModbusSocketFramer");
}

#[test]
fn a_real_modbus_server_gives_its_values_in_frames_of_rtu() {
    asks("rtu", "ModbusRtuFramer");
}
