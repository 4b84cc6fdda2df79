//! The processor a guest is given: what it names itself, what programs built for it find.

use qemu_tests::{artefacts, shared};

#[test]
fn vector_registers_survive_context_switches() {
    const PROCESSES: usize = 6;
    let node = shared::node_with_templates();
    let sandbox = node.sandbox(&[("vcpus", "2")]);
    let tool = std::fs::read(artefacts::node_tool("node-tool")).expect("the tests' program can be read");
    let request = sandbox.request("file.write").set("path", "/tmp/registers").set("mode", "0755");
    let call = sandbox.start(request.set("user", 0));
    assert!(call.writer().write("content", &tool), "the program cannot be written");
    call.writer().end("content");
    call.finish_ok();
    // More processes than processors, each with values of its own in all registers.
    let calls: Vec<_> = (0..PROCESSES)
        .map(|_| sandbox.start(sandbox.exec_request(&["/tmp/registers", "registers", "20000"])))
        .collect();
    let has_avx = sandbox.sh("grep -cw avx /proc/cpuinfo || true").trim() != "0";
    for call in calls {
        let reply = call.finish_ok();
        assert_eq!(reply.field("exit"), "0", "{}", reply.text("stderr"));
        assert_eq!(reply.text("stdout"), if has_avx { "ymm kept\n" } else { "xmm kept\n" });
    }
}

#[test]
fn python_starts_and_computes() {
    let node = shared::node_with_templates();
    let templates = || node.control().ok(qemu_tests::Request::new("", "template.list")).items;
    qemu_tests::timing::wait_for("the python template", || {
        templates().iter().any(|row| row.get("name") == Some("python")).then_some(())
    });
    let sandbox = node.sandbox(&[("template", "python"), ("memory_mib", "256")]);
    let script = "import math, hashlib, struct; print(math.fsum([0.1] * 10), hashlib.sha256(b'abc').hexdigest()[:8])";
    let reply = sandbox.exec(&["python3", "-c", script]);
    assert_eq!(
        (reply.field("exit"), reply.text("stdout").as_str()),
        ("0", "1.0 ba7816bf\n"),
        "{}",
        reply.text("stderr")
    );
}

#[test]
fn a_guest_sees_a_hypervisor_and_nothing_that_is_taken_away() {
    let node = shared::node_with_templates();
    let sandbox = node.sandbox(&[]);
    let info = sandbox.sh("cat /proc/cpuinfo");
    let value = |key: &str| {
        let line = info.lines().find_map(|line| line.split_once(':').filter(|(k, _)| k.trim() == key));
        line.map(|(_, value)| value.trim().to_string()).unwrap_or_default()
    };
    let flags = value("flags");
    let has = |flag: &str| flags.split(' ').any(|f| f == flag);
    for flag in ["hypervisor", "tsc_deadline_timer", "x2apic", "sse4_2", "aes", "arat", "rdrand"] {
        assert!(has(flag), "{flag} is missing: {flags}");
    }
    for flag in ["vmx", "svm", "monitor", "waitpkg", "sgx", "rtm", "hle", "ibs", "skinit", "amx_tile", "perfctr_core"] {
        assert!(!has(flag), "{flag} is there: {flags}");
    }
    let host = node.sh("grep -m1 'model name' /proc/cpuinfo");
    assert_eq!(Some(value("model name").as_str()), host.split_once(':').map(|(_, name)| name.trim()));
    // A kernel that finds the processor at odds with itself says so.
    let log = sandbox.sh("dmesg");
    for complaint in ["WARNING: CPU", "[Firmware Bug]", "consistency problem"] {
        assert!(!log.contains(complaint), "{log}");
    }
}
