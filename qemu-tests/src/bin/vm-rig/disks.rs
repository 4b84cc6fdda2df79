//! `disks DEVICE`: a raw block device under the root disk, and what a worker tells of each disk.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qemu_tests::rig::Setup;
use warren::wire::Request;

const IMAGE: &str = "/usr/share/warren/templates/base/rootfs.img";

pub fn run(arguments: &[&str]) {
    let device = arguments.first().expect("a block device is named");
    let image = std::fs::read(IMAGE).expect("the node has the base template");
    let base = File::options().read(true).write(true).open(device).expect("the device can be opened");
    base.write_all_at(&image, 0).expect("the device takes the image");
    base.sync_all().expect("the device is synced");
    drop(base);

    let extra = File::options().read(true).open(IMAGE).expect("the node has the base template");
    let vm = Setup::new().base(Path::new(device)).descriptor_with("disk", "copy:ro:", extra).start();
    vm.sh("echo changed >> /etc/passwd; head -c 4000000 /dev/urandom > /workspace/noise; sync");
    vm.sh("cmp -n 1000000 /dev/vdb /dev/vdb && rm /workspace/noise && sync && fstrim /");
    let rows = vm.control().ok(Request::new("", "vm.stats")).items;
    let names: Vec<_> = rows.iter().filter_map(|row| row.get("disk")).collect();
    assert_eq!(names, ["root", "copy"]);
    let number = |row: usize, key: &str| rows[row].number(key).unwrap_or_else(|| panic!("no {key}: {rows:?}"));
    assert!(number(0, "writes") > 0 && number(0, "flushes") > 0 && number(0, "discards") > 0, "{rows:?}");
    assert!(number(1, "read_bytes") >= 1_000_000 && number(1, "written_bytes") == 0, "{rows:?}");
    for (n, row) in rows.iter().enumerate() {
        let latency = row.get("latency_us").expect("a histogram");
        let sum: u64 = latency.split(',').map(|bucket| bucket.parse::<u64>().expect("a number")).sum();
        // One may be under way at this moment.
        assert!((number(n, "requests") - 1..=number(n, "requests")).contains(&sum), "{row:?}");
    }
    assert_eq!(vm.stop().reason, "stopped");

    let mut after = vec![0; image.len()];
    File::open(device).and_then(|mut base| base.read_exact(&mut after)).expect("the device can be read");
    assert!(after == image, "the base has changed");
}
