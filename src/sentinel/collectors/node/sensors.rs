//! What is one file per value in /sys: sensors (Documentation/hwmon/sysfs-interface.rst) and network interfaces
//! (Documentation/ABI/testing/sysfs-class-net).

use std::path::Path;

use super::files;
use crate::sentinel::collect::Gatherer;
use crate::sentinel::model::Kind;

/// Sensor kinds: prefix of the file, unit in the name, factor from the file's unit.
const SENSORS: [(&str, &str, f64, Kind); 7] = [
    ("temp", "celsius", 0.001, Kind::Gauge),
    ("in", "volts", 0.001, Kind::Gauge),
    ("fan", "rpm", 1.0, Kind::Gauge),
    ("power", "watt", 0.000_001, Kind::Gauge),
    ("curr", "amps", 0.001, Kind::Gauge),
    ("energy", "joule_total", 0.000_001, Kind::Counter),
    ("humidity", "", 0.001, Kind::Gauge),
];

/// Readings, limits and names of all sensors.
pub fn hwmon(root: &Path, out: &mut Gatherer<'_>) {
    let class = root.join("sys/class/hwmon");
    for entry in files::names(&class) {
        let mut directory = class.join(&entry);
        let names = files::names(&directory);
        // Old drivers have their files one level deeper.
        if !names.iter().any(|name| name.ends_with("_input")) && directory.join("device/name").exists() {
            directory = directory.join("device");
        }
        let chip = chip(&directory, &entry);
        let name = files::read(&directory.join("name"));
        if !name.trim().is_empty() {
            let labels = [("chip", chip.as_str()), ("chip_name", name.trim())];
            out.add("node_hwmon_chip_names", Kind::Gauge, &labels, 1.0);
        }
        for file in files::names(&directory) {
            sensor(&directory, &chip, &file, out);
        }
    }
}

/// One file: `temp1_input` is a reading, `temp1_crit` a limit, `temp1_label` a name.
fn sensor(directory: &Path, chip: &str, file: &str, out: &mut Gatherer<'_>) {
    let Some((sensor, what)) = file.split_once('_') else { return };
    let prefix = sensor.trim_end_matches(|c: char| c.is_ascii_digit());
    let Some((_, unit, scale, kind)) = SENSORS.iter().find(|(known, ..)| *known == prefix) else { return };
    if sensor.len() == prefix.len() {
        return;
    }
    let labels = [("chip", chip), ("sensor", sensor)];
    if what == "label" {
        let label = files::read(&directory.join(file));
        let labels = [labels[0], labels[1], ("label", label.trim())];
        return out.add("node_hwmon_sensor_label", Kind::Gauge, &labels, 1.0);
    }
    let what = match what {
        // A power meter has its reading in `average` where it has no other.
        "average" if prefix == "power" => "_average",
        "input" => "",
        "max" | "min" | "crit" | "lcrit" | "emergency" => &format!("_{what}"),
        "alarm" | "crit_alarm" | "max_alarm" | "min_alarm" | "fault" => {
            if let Some(value) = files::number(&directory.join(file)) {
                out.add(&format!("node_hwmon_{prefix}_{what}"), Kind::Gauge, &labels, value);
            }
            return;
        }
        _ => return,
    };
    if let Some(value) = files::number(&directory.join(file)) {
        let unit = if unit.is_empty() { String::new() } else { format!("_{unit}") };
        out.add(&format!("node_hwmon_{prefix}{what}{unit}"), *kind, &labels, value * scale);
    }
}

/// A name that stays over restarts: bus and device, as node_exporter makes it; hwmon numbers change.
fn chip(directory: &Path, entry: &str) -> String {
    if let Ok(device) = directory.join("device").canonicalize()
        && let (Some(name), Some(kind)) = (device.file_name(), device.parent().and_then(Path::file_name))
    {
        let (kind, name) = (clean(&kind.to_string_lossy()), clean(&name.to_string_lossy()));
        if !kind.is_empty() && !name.is_empty() {
            return format!("{kind}_{name}");
        }
    }
    let name = clean(&files::read(&directory.join("name")));
    if name.is_empty() { clean(entry) } else { name }
}

fn clean(raw: &str) -> String {
    let lower = raw.trim().to_ascii_lowercase();
    let name: String = lower.chars().map(|c| if c.is_ascii_alphanumeric() || c == ':' { c } else { '_' }).collect();
    name.trim_matches('_').to_string()
}

/// State, speed and MTU of network interfaces.
pub fn interfaces(root: &Path, wanted: &dyn Fn(&str) -> bool, out: &mut Gatherer<'_>) {
    let class = root.join("sys/class/net");
    for device in files::names(&class).iter().filter(|device| wanted(device)) {
        let directory = class.join(device);
        let labels = [("device", device.as_str())];
        let up = files::read(&directory.join("operstate"));
        if !up.is_empty() {
            out.add("node_network_up", Kind::Gauge, &labels, f64::from(u8::from(up.trim() == "up")));
        }
        for (file, name, scale, kind) in [
            ("carrier", "carrier", 1.0, Kind::Gauge),
            ("carrier_changes", "carrier_changes_total", 1.0, Kind::Counter),
            ("mtu", "mtu_bytes", 1.0, Kind::Gauge),
            ("tx_queue_len", "transmit_queue_length", 1.0, Kind::Gauge),
            // Megabits; -1 where the driver does not know.
            ("speed", "speed_bytes", 125_000.0, Kind::Gauge),
        ] {
            if let Some(value) = files::number(&directory.join(file)).filter(|value| *value >= 0.0) {
                out.add(&format!("node_network_{name}"), kind, &labels, value * scale);
            }
        }
    }
}
