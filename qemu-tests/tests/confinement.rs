//! What programs inside of a sandbox are kept from, and who asks otherwise.

use qemu_tests::fault::next_supervisor;
use qemu_tests::{Code, Sandbox, shared, timing};

/// A line of /proc/self/status of a program that is started with these keys.
fn status(sandbox: &Sandbox, keys: &[(&str, &str)]) -> Vec<String> {
    let request = sandbox.exec_request(&["cat", "/proc/self/status"]);
    let text = sandbox.client().ok(keys.iter().fold(request, |request, (key, value)| request.set(key, value)));
    let text = text.text("stdout");
    let lines = ["Uid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"].map(|key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
        line.unwrap_or("-").to_string()
    });
    lines.to_vec()
}

/// What a line of shell prints, of the user that programs have when nothing is said.
fn as_user(sandbox: &Sandbox, script: &str) -> String {
    let reply = sandbox.exec(&["sh", "-c", script]);
    assert_eq!(reply.field("exit"), "0", "{script}: {}", reply.text("stderr"));
    reply.text("stdout")
}

/// Starts a program that runs for long; the number that it has.
fn in_background(sandbox: &Sandbox, keys: &[(&str, &str)]) -> (qemu_tests::Call, String) {
    let request = sandbox.exec_request(&["sh", "-c", "echo begun; exec sleep 1000"]);
    let mut call = sandbox.start(keys.iter().fold(request, |request, (key, value)| request.set(key, value)));
    let pid = call.item().get("pid").expect("its number").to_string();
    call.read_until("stdout", "begun");
    (call, pid)
}

#[test]
fn programs_have_no_privileges_and_see_each_other_and_nobody_else() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[]);
    const NONE: &str = "0000000000000000";
    let confined = status(&sandbox, &[]);
    assert_eq!(confined, ["1000\t1000\t1000\t1000", NONE, NONE, NONE, NONE, NONE, "1", "2"]);
    let (user, pid) = in_background(&sandbox, &[]);
    let (root, _) = in_background(&sandbox, &[("user", "root")]);
    // Its own processes, of which process 1 is the keeper.
    assert_eq!(as_user(&sandbox, "cat /proc/1/comm").trim(), "keeper");
    let seen = as_user(&sandbox, "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done");
    assert_eq!(seen.matches("sleep 1000").count(), 1, "{seen}");
    as_user(&sandbox, &format!("kill {pid}"));
    assert_eq!(user.finish_ok().field("signal"), "15");
    let all = sandbox.sh("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done");
    assert_eq!(all.matches("sleep 1000").count(), 1, "root's goes on: {all}");
    drop(root);

    // What a program leaves behind has the keeper as its parent, which reaps it.
    as_user(&sandbox, "(sleep 1000 > /dev/null 2>&1 & echo $! > /workspace/orphan)");
    let orphan = "$(cat /workspace/orphan)";
    assert_eq!(as_user(&sandbox, &format!("grep PPid /proc/{orphan}/status")).trim(), "PPid:\t1");
    as_user(&sandbox, &format!("kill {orphan}"));
    timing::wait_for("it to be reaped", || {
        (as_user(&sandbox, &format!("ls -d /proc/{orphan} 2>/dev/null; true")).is_empty()).then_some(())
    });
}

#[test]
fn system_calls_that_programs_have_no_business_with_fail() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[("template", "python")]);
    let script = "
import ctypes, errno, os, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *arguments):
    print(name, errno.errorcode.get(ctypes.get_errno()) if libc.syscall(number, *arguments) < 0 else 'done')
call('unshare', 272, 0x10000000)
call('mount', 165, b'x', b'/mnt', b'tmpfs', 0, 0)
call('clone-user', 56, 0x10000000 | 17, 0, 0, 0, 0)
call('clone3', 435, 0, 0)
call('bpf', 321, 0, 0, 0)
call('io_uring', 425, 1, 0)
call('keyctl', 250, 0, 0)
call('newer', 500)
for family in 1, 2, 16, 17, 38, 40:
    try:
        socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_DGRAM if family != 38 else 5).close()
        print(family, 'done')
    except OSError as error:
        print(family, errno.errorcode[error.errno])
thread = threading.Thread(target=lambda: print('thread done'))
thread.start(); thread.join()
print('fork', os.WEXITSTATUS(os.waitpid(os.fork() or os._exit(7), 0)[1]))
";
    let said = sandbox.exec(&["python3", "-c", script]);
    let expected = "unshare EPERM\nmount EPERM\nclone-user EPERM\nclone3 ENOSYS\nbpf EPERM\nio_uring EPERM\nkeyctl EPERM\n\
        newer ENOSYS\n1 done\n2 done\n16 done\n17 EAFNOSUPPORT\n38 EAFNOSUPPORT\n40 EAFNOSUPPORT\nthread done\nfork 7\n";
    assert_eq!((said.text("stdout").as_str(), said.text("stderr").as_str()), (expected, ""));
    // A setuid program gives nothing.
    sandbox.sh("cp /bin/cat /bin/cat-of-root; chmod 4755 /bin/cat-of-root");
    sandbox.sh("echo secret > /etc/secret; chmod 600 /etc/secret");
    let refused = sandbox.exec(&["/bin/cat-of-root", "/etc/secret"]);
    assert!(refused.field("exit") != "0" && refused.text("stderr").contains("denied"), "{refused:?}");
    let privileged = sandbox.exec_request(&["/bin/cat-of-root", "/etc/secret"]).set("privileged", true);
    assert_eq!(sandbox.client().ok(privileged).text("stdout"), "secret\n");
}

/// As of a template whose image names no user: uid 0, but nobody has asked for root.
#[test]
fn uid_0_that_was_not_asked_for_has_power_over_the_sandboxs_files_and_no_more() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[("template", "python")]);
    sandbox.sh("printf 'toor:x:0:0::/root:/bin/sh\\n' >> /etc/passwd; touch /etc/theirs; chown 7:7 /etc/theirs; chmod 600 /etc/theirs");
    const NONE: &str = "0000000000000000";
    const KEPT: &str = "00000000000424fb";
    let toor = status(&sandbox, &[("user", "toor")]);
    assert_eq!(toor, ["0\t0\t0\t0", NONE, KEPT, KEPT, KEPT, NONE, "1", "2"]);
    let said = |script: &str| {
        let reply = sandbox.client().ok(sandbox.exec_request(&["sh", "-c", script]).set("user", "toor"));
        (reply.field("exit").to_string(), reply.text("stdout"), reply.text("stderr"))
    };
    for possible in [
        "echo mine >> /etc/theirs && chown 1000 /etc/theirs && chmod 4755 /etc/theirs",
        "mkdir /var/lib/thing && rmdir /var/lib/thing",
        "echo x > /dev/null && head -c 1 /dev/urandom > /dev/shm/octet && rm /dev/shm/octet",
        "python3 -c 'import socket; socket.create_server((\"127.0.0.1\", 80))'",
        "python3 -c 'import os; os.setgroups([]); os.setgid(1000); os.setuid(1000); open(\"/workspace/ours\", \"w\")'",
    ] {
        let (exit, _, stderr) = said(possible);
        assert_eq!((exit.as_str(), stderr.as_str()), ("0", ""), "{possible}");
    }
    for (impossible, why) in [
        ("mount -t tmpfs none /mnt", ""),
        ("mknod /tmp/disk b 254 0", "not permitted"),
        ("echo 1 > /proc/sys/vm/overcommit_memory", "Read-only"),
        ("echo b > /proc/sysrq-trigger", "cannot create"),
        ("mkdir /sys/fs/cgroup/mine", "Read-only"),
        ("echo max > /sys/fs/cgroup/users/memory.max", "Read-only"),
        ("echo mem > /sys/power/state", ""),
        ("cat /proc/1/environ", "denied"),
        ("ls /dev/vda", "No such"),
        ("mount -o remount,rw /sys", ""),
    ] {
        let (exit, _, stderr) = said(impossible);
        assert!(exit != "0" && stderr.contains(why), "{impossible}: {exit} {stderr}");
    }
    assert_eq!(said("ls /dev").1.split_whitespace().collect::<Vec<_>>().join(" "), DEVICES);
    // It is among users' programs: neither the agent's number nor root's programs are there to be killed.
    let (root, _) = in_background(&sandbox, &[("user", "root")]);
    said("kill -9 -1");
    assert!(sandbox.sh("cat /proc/*/cmdline | tr '\\0' ' '").contains("sleep 1000"));
    drop(root);
    assert_eq!(status(&sandbox, &[("user", "toor"), ("privileged", "true")])[6..], ["0", "0"]);
}

const DEVICES: &str = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";

#[test]
fn who_asks_otherwise_gets_otherwise() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[]);
    let root = status(&sandbox, &[("user", "root")]);
    assert!(root[0].starts_with("0\t") && !root[3].starts_with("0000000000000000"), "{root:?}");
    assert_eq!(root[6..], ["0", "0"]);
    let privileged = status(&sandbox, &[("privileged", "true")]);
    assert!(privileged[0].starts_with("1000\t"), "{privileged:?}");
    assert_eq!(privileged[6..], ["0", "0"]);
    // What root mounts is there for all.
    sandbox.sh("mkdir -p /mnt && mount -t tmpfs none /mnt && echo shared > /mnt/file");
    assert_eq!(as_user(&sandbox, "cat /mnt/file"), "shared\n");
    sandbox.sh("umount /mnt");
    assert_eq!(as_user(&sandbox, "ls /mnt"), "");
    let unknown = sandbox.client().err(sandbox.exec_request(&["true"]).set("privileged", "perhaps"));
    assert!(unknown.is(Code::BadArgument), "{unknown}");
}

#[test]
fn a_root_that_is_read_only_stays_so() {
    let turn = shared::node_with_templates();
    let node = &*turn;
    let sandbox = node.sandbox(&[("read_only", "true"), ("restart", "on-failure")]);
    assert_eq!(sandbox.inspect().get("read_only"), Some("true"));
    let check = || {
        let refused = sandbox.exec(&["sh", "-c", "touch /etc/file"]);
        assert!(refused.text("stderr").contains("Read-only file system"), "{refused:?}");
        as_user(&sandbox, "touch /workspace/file /tmp/file /dev/shm/file");
        sandbox.sh("touch /etc/of-root");
    };
    check();
    let run = sandbox.start(sandbox.request("code.run").set("language", "sh"));
    let writer = run.writer();
    assert!(writer.write("source", b"echo made > made.txt; touch /etc/file"));
    writer.end("source");
    let run = run.finish_ok();
    assert!(run.field("exit") != "0" && run.text("result").contains("made.txt"), "{run:?}");
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(node, killed);
    timing::wait_for("its agent", || sandbox.client().call(sandbox.exec_request(&["true"])).ok());
    check();
    sandbox.client().ok(sandbox.request("sandbox.pause"));
    sandbox.client().ok(sandbox.request("sandbox.resume"));
    check();
}

#[test]
fn when_the_keeper_is_killed_its_programs_end_and_the_next_one_has_another() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[("read_only", "true")]);
    let (call, _) = in_background(&sandbox, &[]);
    sandbox.sh("for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = keeper ] && kill -9 ${p#/proc/}; done; true");
    assert_eq!(call.finish_ok().field("signal"), "9");
    // The agent may hear of the one and then of the other.
    let again = timing::wait_for("a program to be started", || {
        sandbox.client().call(sandbox.exec_request(&["sh", "-c", "cat /proc/1/comm; touch /etc/file"])).ok()
    });
    assert_eq!(again.text("stdout"), "keeper\n");
    assert!(again.text("stderr").contains("Read-only file system"), "the new one is as the old was: {again:?}");
}

#[test]
fn code_and_what_a_stop_leaves_are_kept_the_same_way() {
    let turn = shared::node_with_templates();
    let sandbox = turn.sandbox(&[]);
    let run = sandbox.start(sandbox.request("code.run").set("language", "sh"));
    let writer = run.writer();
    assert!(writer.write("source", b"grep -E 'CapBnd|NoNewPrivs|Seccomp:' /proc/self/status"));
    writer.end("source");
    assert_eq!(run.finish_ok().text("stdout"), "CapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n");
    // One that ignores being asked to end, left behind: the guest goes down all the same, and cleanly.
    as_user(&sandbox, "(trap '' TERM; sleep 1000 > /dev/null 2>&1 &)");
    let stopped = sandbox.stop();
    assert_eq!(stopped.field("state"), "stopped", "{stopped:?}");
}
