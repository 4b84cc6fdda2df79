use super::*;
use crate::sentinel::model::SeriesTable;
use std::collections::BTreeMap;

fn measured(measure: impl FnOnce(&mut Gatherer<'_>)) -> BTreeMap<String, f64> {
    let (table, labels) = (Arc::new(SeriesTable::new(100_000)), BTreeMap::new());
    let mut out = Gatherer::new(&table, &labels, 1);
    measure(&mut out);
    out.done().samples.iter().map(|sample| (sample.series.to_string(), sample.value)).collect()
}

#[test]
fn cpu_times_are_in_seconds_by_mode() {
    let text = "cpu  9 9 9 9 9\ncpu0 150 2 300 4000 5 6 7 8 9 10\ncpu1 1 x 3\nintr 77 1 2 3\nctxt 5\nbtime 1700000000\n\
                processes 12\nprocs_running 2\nprocs_blocked 1\nsoftirq 1 2 3\n";
    let values = measured(|out| stat(text, out));
    assert_eq!(values[r#"node_cpu_seconds_total{cpu="0",mode="user"}"#], 1.5);
    assert_eq!(values[r#"node_cpu_seconds_total{cpu="0",mode="steal"}"#], 0.08);
    assert_eq!(values[r#"node_cpu_guest_seconds_total{cpu="0",mode="nice"}"#], 0.1);
    assert_eq!(values["node_intr_total"], 77.0);
    assert_eq!(values["node_procs_blocked"], 1.0);
    assert!(!values.keys().any(|name| name.contains(r#"cpu="""#)));
    assert_eq!(values.keys().filter(|name| name.contains(r#"cpu="1""#)).count(), 1);
}

#[test]
fn memory_names_and_units_are_node_exporters() {
    let values = measured(|out| {
        meminfo("MemTotal:  8 kB\nActive(anon): 2 kB\nHugePages_Total:  3\nBad: x kB\nOdd: 1 MB\n", out);
        vmstat("oom_kill 1\npgpgin 2\npgfault 3\npgmajfault 4\nnr_free_pages 5\npswpout 6\n", out);
    });
    let names: Vec<&str> = values.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "node_memory_Active_anon_bytes",
            "node_memory_HugePages_Total",
            "node_memory_MemTotal_bytes",
            "node_vmstat_oom_kill",
            "node_vmstat_pgfault",
            "node_vmstat_pgmajfault",
            "node_vmstat_pgpgin",
            "node_vmstat_pswpout",
        ]
    );
    assert_eq!(values["node_memory_MemTotal_bytes"], 8192.0);
}

#[test]
fn disks_interfaces_and_pressure_come_out_scaled() {
    let values = measured(|out| {
        diskstats(
            "259 0 nvme0n1 1 2 3 4000 5 6 7 8 9 10 11 12 13 14 15 16 17\n259 1 nvme0n1p1 1 2 3\n",
            &|d| d == "nvme0n1",
            out,
        );
        net_dev(
            "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes carrier\n  lo: 1 2 3 4\neth0:1: 5 6 7 8\nbad\n",
            &|d| d != "lo",
            out,
        );
        pressure("io", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\nfull avg10=0.00 total=500000\n", out);
        pressure("cpu", "some total=1\nfull total=0\n", out);
    });
    assert_eq!(values[r#"node_disk_read_bytes_total{device="nvme0n1"}"#], 1536.0);
    assert_eq!(values[r#"node_disk_read_time_seconds_total{device="nvme0n1"}"#], 4.0);
    assert_eq!(values.keys().filter(|name| name.starts_with("node_disk")).count(), 17);
    assert_eq!(values[r#"node_network_transmit_carrier_total{device="eth0:1"}"#], 8.0);
    assert_eq!(values["node_pressure_io_waiting_seconds_total"], 1.5);
    assert_eq!(values["node_pressure_io_stalled_seconds_total"], 0.5);
    assert!(!values.contains_key("node_pressure_cpu_stalled_seconds_total"));
}

#[test]
fn sensors_have_stable_chips_and_base_units() {
    let root = std::env::temp_dir().join(format!("warren-hwmon-{}", std::process::id()));
    let device = root.join("sys/devices/platform/coretemp.0");
    let chip = device.join("hwmon/hwmon3");
    std::fs::create_dir_all(&chip).unwrap();
    std::fs::create_dir_all(root.join("sys/class/hwmon")).unwrap();
    std::os::unix::fs::symlink(&device, chip.join("device")).unwrap();
    std::os::unix::fs::symlink(&chip, root.join("sys/class/hwmon/hwmon3")).unwrap();
    for (file, text) in [
        ("name", "coretemp\n"),
        ("temp1_input", "45500\n"),
        ("temp1_crit", "100000"),
        ("temp1_label", "Core 0"),
        ("fan2_input", "1200"),
        ("temp_bad", "1"),
        ("temp2_input", "?"),
        ("in0_min", "250"),
        ("temp1_crit_alarm", "1"),
    ] {
        std::fs::write(chip.join(file), text).unwrap();
    }
    let values = measured(|out| sensors::hwmon(&root, out));
    std::fs::remove_dir_all(&root).unwrap();
    let expected = [
        (r#"node_hwmon_chip_names{chip="platform_coretemp_0",chip_name="coretemp"}"#, 1.0),
        (r#"node_hwmon_fan_rpm{chip="platform_coretemp_0",sensor="fan2"}"#, 1200.0),
        (r#"node_hwmon_in_min_volts{chip="platform_coretemp_0",sensor="in0"}"#, 0.25),
        (r#"node_hwmon_sensor_label{chip="platform_coretemp_0",label="Core 0",sensor="temp1"}"#, 1.0),
        (r#"node_hwmon_temp_celsius{chip="platform_coretemp_0",sensor="temp1"}"#, 45.5),
        (r#"node_hwmon_temp_crit_alarm{chip="platform_coretemp_0",sensor="temp1"}"#, 1.0),
        (r#"node_hwmon_temp_crit_celsius{chip="platform_coretemp_0",sensor="temp1"}"#, 100.0),
    ];
    assert_eq!(values, expected.into_iter().map(|(name, value)| (name.to_string(), value)).collect());
}

#[test]
fn this_machine_has_values_for_everything_it_must_have() {
    let task = Task {
        id: "node".into(),
        plugin: "node".into(),
        device: Default::default(),
        config: Default::default(),
        labels: [("region".to_string(), "x".to_string())].into(),
        interval: std::time::Duration::from_secs(60),
        timeout: std::time::Duration::from_secs(30),
        priority: 0,
        retries: 0,
    };
    let table = Arc::new(SeriesTable::new(100_000));
    let all = crate::sentinel::collect::once(Default::default(), vec![task], table).unwrap();
    let (report, samples) = &all[0];
    assert_eq!(report.outcome, crate::sentinel::task::Outcome::Success);
    assert_eq!(report.samples, samples.len() as u64);
    for name in [
        "node_cpu_seconds_total",
        "node_load1",
        "node_memory_MemTotal_bytes",
        "node_network_receive_bytes_total",
        "node_boot_time_seconds",
        "node_time_seconds",
        "node_uname_info",
        "node_filefd_allocated",
    ] {
        let sample = samples.iter().find(|sample| sample.series.name() == name);
        assert_eq!(sample.unwrap_or_else(|| panic!("{name}")).series.label("region"), Some("x"));
    }
}
