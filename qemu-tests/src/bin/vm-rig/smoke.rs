//! `smoke`: a worker's life from its two descriptors to its last words.

use qemu_tests::rig::Setup;

pub fn run(_: &[&str]) {
    let vm = Setup::new().vcpus(2).start();
    assert_eq!(vm.sh("nproc"), "2\n");
    assert_eq!(vm.sh("df -k / | tail -1 | awk '{ print ($2 > 450000) }'"), "1\n", "the disk has its size");
    let content: Vec<u8> = (0..300_000u32).map(|n| (n * 7 % 251) as u8).collect();
    vm.write_file("/workspace/numbers", 0o640, &content);
    assert!(vm.read_file("/workspace/numbers") == content, "a file comes back as it was written");
    let tool = vm.put_guest_tool();
    assert_eq!(vm.sh(&format!("{tool} cpu threads=2 rounds=100000")).lines().count(), 2);
    assert_eq!(vm.sh(&format!("{tool} memory mib=16 times=2")), "mib=16 times=2\n");
    vm.sh("echo told the console > /dev/console");
    assert!(vm.stat("exits") > 0);
    assert!(vm.stat("block_read_bytes") > 0);
    assert!(vm.process().descriptors() > 8);
    let overhead = vm.process().overhead_kib(128).expect("a running worker's mappings can be read");
    println!("overhead_kib={overhead} threads={}", vm.process().threads());
    let end = vm.stop();
    assert_eq!((end.reason.as_str(), end.status.code()), ("stopped", Some(0)), "{end:?}");
    assert!(end.serial.contains("told the console"), "{}", end.serial);

    let vm = Setup::new().start();
    vm.agent();
    drop(vm.agent().start(warren::wire::Request::new("", "system.poweroff")));
    let end = vm.wait(qemu_tests::timing::hang());
    assert_eq!((end.reason.as_str(), end.status.code()), ("guest-poweroff", Some(0)), "{end:?}");

    let (error, words) = Setup::new().set("no_such_key", 1).try_start().expect_err("an unknown key was taken");
    assert_eq!(error.code, "UNKNOWN_ARGUMENT");
    assert_eq!(words.map(|words| words.reason).as_deref(), Some("stopped"));
}
