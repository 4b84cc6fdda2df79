//! The peer, Firecracker, with the guest of ours.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::connection::Connection;
use qemu_tests::rig::overhead_kib;
use warren::wire::{Message, Request};

use crate::{BOOTS, CONTROL, EXECS, MEMORY_MIB, ask, block, exec, exec_time, milliseconds, print, stream};

/// Firecracker with the same guest kernel, initramfs and drive.
pub struct Peer {
    process: Child,
    api: UnixStream,
}

const API: &str = "/run/peer.api";
const VSOCK: &str = "/run/peer.vsock";
const DRIVE: &str = "/run/peer.drive";
/// Its snapshot.
const STATE: &str = "/run/peer.state";
const MEMORY: &str = "/run/peer.memory";

impl Peer {
    /// Starts its process, and waits for its API.
    fn launch(program: &str) -> io::Result<Self> {
        let start = Instant::now();
        let log = File::create("/run/peer.log")?;
        let process = Command::new(program)
            .args(["--api-sock", API, "--level", "Off"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let api = loop {
            match UnixStream::connect(API) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() > Duration::from_secs(10) => {
                    return Err(io::Error::other("the peer has no socket"));
                }
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        Ok(Self { process, api })
    }

    /// Where its guests' agents call; what an earlier process left is gone.
    fn listener() -> io::Result<UnixListener> {
        let socket = format!("{VSOCK}_1024");
        for path in [API, VSOCK, &socket] {
            let _ = fs::remove_file(path);
        }
        UnixListener::bind(socket)
    }

    /// The agent's link, and when its first octet came.
    fn take_call(listener: &UnixListener, start: Instant) -> io::Result<(Connection, Duration)> {
        let (mut stream, _) = listener.accept()?;
        let mut first = [0u8; 1];
        stream.read_exact(&mut first)?;
        let time = start.elapsed();
        // The rest of the agent's greeting.
        let mut agent = Connection::over(stream);
        agent.feed(&first);
        agent.receive()?;
        Ok((agent, time))
    }

    /// Takes a snapshot of it and ends it.
    fn freeze(mut self) -> io::Result<()> {
        self.send("PATCH", "/vm", r#"{"state":"Paused"}"#)?;
        let body = format!(r#"{{"snapshot_type":"Full","snapshot_path":"{STATE}","mem_file_path":"{MEMORY}"}}"#);
        self.put("/snapshot/create", &body)
    }

    /// Makes a virtual machine of the snapshot; gives it, its agent, and the time from its process' start to the first
    /// vsock octet.
    fn restore(program: &str) -> io::Result<(Self, Connection, Duration)> {
        let listener = Self::listener()?;
        let start = Instant::now();
        let mut peer = Self::launch(program)?;
        let backend = format!(r#"{{"backend_type":"File","backend_path":"{MEMORY}"}}"#);
        let body = format!(r#"{{"snapshot_path":"{STATE}","mem_backend":{backend},"resume_vm":true}}"#);
        peer.put("/snapshot/load", &body)?;
        let (agent, time) = Self::take_call(&listener, start)?;
        Ok((peer, agent, time))
    }
    /// Starts a virtual machine, with a network device where the name of a TAP and an address are given; gives it and
    /// the time from its process' start to the first vsock octet.
    pub fn start(
        program: &str,
        cmdline: &str,
        network: Option<(&str, &str)>,
    ) -> io::Result<(Self, Connection, Duration)> {
        let _ = fs::remove_file(DRIVE);
        fs::copy("/usr/share/warren/templates/base/rootfs.img", DRIVE)?;
        File::options().write(true).open(DRIVE)?.set_len(512 << 20)?;
        let listener = Self::listener()?;

        let start = Instant::now();
        let mut peer = Self::launch(program)?;
        peer.put("/machine-config", &format!(r#"{{"vcpu_count":1,"mem_size_mib":{MEMORY_MIB}}}"#))?;
        let image = "/usr/share/warren";
        peer.put(
            "/boot-source",
            &format!(r#"{{"kernel_image_path":"{image}/vmlinux","initrd_path":"{image}/initramfs.img","boot_args":"{cmdline}"}}"#),
        )?;
        peer.put(
            "/drives/root",
            &format!(r#"{{"drive_id":"root","path_on_host":"{DRIVE}","is_root_device":false,"is_read_only":false}}"#),
        )?;
        if let Some((tap, mac)) = network {
            let body = format!(r#"{{"iface_id":"eth0","host_dev_name":"{tap}","guest_mac":"{mac}"}}"#);
            peer.put("/network-interfaces/eth0", &body)?;
        }
        peer.put("/vsock", &format!(r#"{{"guest_cid":3,"uds_path":"{VSOCK}"}}"#))?;
        peer.put("/actions", r#"{"action_type":"InstanceStart"}"#)?;
        let (agent, time) = Self::take_call(&listener, start)?;
        Ok((peer, agent, time))
    }

    fn put(&mut self, path: &str, body: &str) -> io::Result<()> {
        self.send("PUT", path, body)
    }

    /// One request of the API: HTTP over the socket, kept open.
    fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<()> {
        let length = body.len();
        write!(
            self.api,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        // 204 without a body, or an error with one.
        let mut answer = Vec::new();
        let mut chunk = [0u8; 4096];
        while !answer.windows(4).any(|four| four == b"\r\n\r\n") {
            match self.api.read(&mut chunk)? {
                0 => break,
                n => answer.extend_from_slice(&chunk[..n]),
            }
        }
        if answer.starts_with(b"HTTP/1.1 204") {
            return Ok(());
        }
        Err(io::Error::other(format!("the peer refused {path}: {}", String::from_utf8_lossy(&answer))))
    }

    pub fn measure(program: &str) -> io::Result<()> {
        // Both guests get the same line: devices are found by ACPI, so nothing in it is a worker's alone.
        let cmdline = peer_cmdline()?;
        let mut times = Vec::new();
        let mut last = None;
        for _ in 0..BOOTS {
            drop(last.take());
            let (peer, agent, time) = Self::start(program, &cmdline, None)?;
            times.push(milliseconds(time));
            last = Some((peer, agent));
        }
        let Some((peer, mut agent)) = last else { return Ok(()) };
        let version = Command::new(program).arg("--version").output()?;
        let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_string();
        let condition =
            format!("{version}; its process' start to first vsock octet, same guest, no jail; cmdline {cmdline}");
        print("peer_cold_boot_ms", median(&mut times), "ms", &condition);
        // As the supervisor does for a sandbox: the root file system is as large as its disk.
        ask(&mut agent, Request::new("g", "system.configure").set("grow", true))?;
        ask(&mut agent, exec(None, &["true"]))?;
        print(
            "peer_worker_overhead_kib",
            overhead_kib(peer.process.id(), MEMORY_MIB)? as f64,
            "KiB",
            "private pages outside guest memory",
        );
        let mut times = Vec::new();
        for _ in 0..EXECS {
            times.push(milliseconds(exec_time(&mut agent, exec(None, &["true"]))?));
        }
        print("peer_exec_true_ms", median(&mut times), "ms", "straight to the agent, no node in between");
        print("peer_vsock_mib_per_s", stream(&mut agent, None)?, "MiB/s", "its vsock socket to a program's stdin");
        block(&mut agent, None)?.print("peer_", "raw file in tmpfs");
        agent.stream().shutdown(Shutdown::Both)?;
        drop(peer);

        // The same guest again, as its boot leaves it: what the programs above wrote is none of a template.
        let (peer, agent, _) = Self::start(program, &cmdline, None)?;
        drop(agent);
        peer.freeze()?;
        let mut times = Vec::new();
        for _ in 0..BOOTS {
            let (_peer, _agent, time) = Self::restore(program)?;
            times.push(milliseconds(time));
        }
        let condition = "its process' start to first vsock octet of a restored guest; no jail, no network";
        print("peer_restore_ms", median(&mut times), "ms", condition);
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The command line that a worker gives its guest, as one of them sees it.
pub fn peer_cmdline() -> io::Result<String> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    let create = Request::new("c", "sandbox.create").set("memory_mib", MEMORY_MIB);
    let id = ask(&mut control, create)?.1.get("id").unwrap_or_default().to_string();
    control.send(&Message::Request(exec(Some(&id), &["cat", "/proc/cmdline"])))?;
    let mut line = Vec::new();
    loop {
        match control.receive()? {
            Message::Data { channel, payload, .. } if channel == "stdout" => line.extend(payload),
            message if message.is_final() => break,
            _ => {}
        }
    }
    ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
    Ok(String::from_utf8_lossy(&line).trim().to_string())
}
