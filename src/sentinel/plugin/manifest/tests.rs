use super::*;
use serde_json::json;

const EVERY_KIND: &str = r#"
name = "all"
version = "1"
[[device_fields]]
name = "host"
type = "string"
required = true
pattern = "[a-z0-9.-]+"
[[device_fields]]
name = "mode"
type = "string"
choices = ["a", "b"]
[[device_fields]]
name = "port"
type = "int"
default = 161
min = 1
max = 65535
[[device_fields]]
name = "scale"
type = "number"
min = 0
[[device_fields]]
name = "fast"
type = "bool"
[[device_fields]]
name = "secret"
type = "password"
pattern = ".{8,}"
[[device_fields]]
name = "hosts"
type = "list"
max = 2
pattern = "[a-z]+"
[[device_fields]]
name = "rows"
type = "list"
items = [{ name = "oid", type = "string", required = true }, { name = "n", type = "int" }]
[[device_fields]]
name = "labels"
type = "table"
"#;

fn refused(device: serde_json::Value) -> String {
    let manifest = Manifest::parse(EVERY_KIND).unwrap();
    manifest.device.check("device", device.as_object().unwrap()).unwrap_err().to_string()
}

#[test]
fn every_type_and_rule_is_refused_with_its_field_and_the_reason() {
    for (given, said) in [
        (json!({}), "device.host: is required"),
        (json!({"host": null}), "device.host: is required"),
        (json!({"host": ""}), "device.host: is required and empty"),
        (json!({"host": 1}), "device.host: is a number, expected string"),
        (json!({"host": "A b"}), "device.host: \"A b\" does not match ^(?:[a-z0-9.-]+)$"),
        (json!({"host": "a", "mode": "c"}), "device.mode: \"c\" is none of a, b"),
        (json!({"host": "a", "port": "1"}), "device.port: is text, expected int"),
        (json!({"host": "a", "port": 1.5}), "device.port: 1.5 is not a whole number"),
        (json!({"host": "a", "port": 0}), "device.port: 0 is under the least of 1"),
        (json!({"host": "a", "port": 65536}), "device.port: 65536 is over the limit of 65535"),
        (json!({"host": "a", "scale": true}), "device.scale: is a truth value, expected number"),
        (json!({"host": "a", "scale": -0.5}), "device.scale: -0.5 is under the least of 0"),
        (json!({"host": "a", "fast": "yes"}), "device.fast: is text, expected bool"),
        (json!({"host": "a", "secret": ["x"]}), "device.secret: is a list, expected password"),
        (json!({"host": "a", "hosts": "a"}), "device.hosts: is text, expected list"),
        (json!({"host": "a", "hosts": [1]}), "device.hosts[0]: is a number, expected text"),
        (json!({"host": "a", "hosts": ["a", "B"]}), "device.hosts[1]: \"B\" does not match ^(?:[a-z]+)$"),
        (json!({"host": "a", "hosts": ["a", "b", "c"]}), "device.hosts: 3 items is over the limit of 2"),
        (json!({"host": "a", "rows": ["x"]}), "device.rows[0]: is text, expected a table"),
        (json!({"host": "a", "rows": [{"oid": "1"}, {"n": 1}]}), "device.rows[1].oid: is required"),
        (json!({"host": "a", "rows": [{"oid": "1", "n": "1"}]}), "device.rows[0].n: is text, expected int"),
        (json!({"host": "a", "labels": []}), "device.labels: is a list, expected table"),
        (
            json!({"host": "a", "labels": {"x": {}}}),
            "device.labels.x: is a table, expected text, a number or a truth value",
        ),
    ] {
        assert_eq!(refused(given), said);
    }
    assert!(refused(json!({"host": "a", "hots": 1})).starts_with("device.hots: is not a field here; there are: host,"));
}

#[test]
fn a_password_is_in_no_error_and_no_debug_output() {
    let said = refused(json!({"host": "a", "secret": "hunter2"}));
    assert_eq!(said, "device.secret: its value does not match ^(?:.{8,})$");
    let manifest = Manifest::parse(EVERY_KIND).unwrap();
    let given = json!({"host": "a", "secret": "correct horse"});
    let values = manifest.device.check("device", given.as_object().unwrap()).unwrap();
    assert_eq!(values.text("secret"), "correct horse");
    assert!(!format!("{values:?}").contains("correct"));
}

#[test]
fn defaults_are_filled_in_and_values_come_out_typed() {
    let manifest = Manifest::parse(EVERY_KIND).unwrap();
    let given = json!({"host": "a", "rows": [{"oid": "1.3"}], "hosts": ["x"], "labels": {"a": 1, "b": "c"}});
    let values = manifest.device.check("device", given.as_object().unwrap()).unwrap();
    assert_eq!((values.text("host"), values.whole::<u16>("port")), ("a", 161));
    assert_eq!(values.tables("rows")[0].text("oid"), "1.3");
    assert_eq!(values.texts("hosts"), ["x"]);
    assert_eq!(values.entries("labels"), [("a", "1".to_string()), ("b", "c".to_string())]);
    assert!(!values.has("scale") && !values.flag("fast"));
}

#[test]
fn what_is_no_manifest_is_refused_with_the_place() {
    let head = "name = \"x\"\nversion = \"1\"\n";
    let with = |rest: &str| Manifest::parse(&format!("{head}{rest}")).unwrap_err().0;
    assert!(Manifest::parse("version = \"1\"").unwrap_err().0.contains("name"));
    assert!(Manifest::parse("name = \"X\"\nversion = \"1\"").unwrap_err().0.starts_with("name: \"X\""));
    assert!(with("nmae = 1").contains("nmae"));
    for (rest, said) in [
        ("[[device_fields]]\nname = \"a\"\ntype = \"text\"", "device_fields.a: type \"text\" is none of"),
        ("[[device_fields]]\nname = \"A\"\ntype = \"int\"", "device_fields.A: a field's name"),
        (
            "[[device_fields]]\nname = \"a\"\ntype = \"int\"\n[[device_fields]]\nname = \"a\"\ntype = \"int\"",
            "device_fields.a: is declared twice",
        ),
        ("[[config_fields]]\nname = \"a\"\ntype = \"string\"\npattern = \"(\"", "config_fields.a: pattern: "),
        ("[[config_fields]]\nname = \"a\"\ntype = \"int\"\ndefault = \"x\"", "config_fields.a: default.a: is text"),
        (
            "[[config_fields]]\nname = \"a\"\ntype = \"int\"\ndefault = 1\nrequired = true",
            "config_fields.a: is required",
        ),
        (
            "[[config_fields]]\nname = \"a\"\ntype = \"int\"\nitems = [{name = \"b\", type = \"int\"}]",
            "config_fields.a: only a list",
        ),
        ("[[metrics]]\nname = \"a b\"\ntype = \"gauge\"", "metrics: \"a b\""),
        ("[[metrics]]\nname = \"a\"\ntype = \"gouge\"", "metrics.a: type \"gouge\""),
        ("[program]\ncommand = []\nform = \"native\"", "program.command"),
        ("[program]\ncommand = [\"x\"]\nform = \"native\"\nmemory_mib = 1", "program.memory_mib: 1 is out of range"),
        ("[program]\ncommand = [\"x\"]\nform = \"native\"\nenvironment = { \"a=\" = \"\" }", "program.environment"),
    ] {
        assert!(with(rest).starts_with(said), "{rest}: {}", with(rest));
    }
    assert!(with("[program]\ncommand = [\"x\"]\nform = \"grpc\"").contains("grpc"));
}
