//! Programs of others that the sentinel is tested against, as `image/peers` gets them.

use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use warren::sentinel::http::{Client, Request, TlsOptions, Url};

use crate::process::{Scratch, until};

/// A program of a Debian package, ready for its arguments; nothing, loudly, where it is not there.
pub fn program(package: &str, path: &str) -> Option<Command> {
    let cache = std::env::var_os("WARREN_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("warren")))
        .or_else(|| std::env::var_os("HOME").map(|path| PathBuf::from(path).join(".cache/warren")))?;
    let root = cache.join("peers").join(package);
    let found = [root.join(path), PathBuf::from("/").join(path)].into_iter().find(|path| path.exists());
    // An interpreter does without the package in question.
    let Some(found) = found.filter(|_| root.join("done").exists() || !path.contains("python")) else {
        eprintln!("SKIPPED: there is no {package} here; image/peers gets it");
        return None;
    };
    let mut command = Command::new(found);
    let libraries = [root.join("usr/lib/x86_64-linux-gnu"), root.join("lib/x86_64-linux-gnu")];
    command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    command.env("PYTHONPATH", root.join("usr/lib/python3/dist-packages"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Some(command)
}

/// A program that runs, in a directory and on a port of its own.
pub struct Peer {
    child: Child,
    pub address: String,
    pub scratch: Scratch,
}

impl Peer {
    /// `arguments` gets the directory and the address to listen on; `ready` says when it does.
    fn start(
        package: &str,
        path: &str,
        arguments: impl Fn(&Scratch, &str) -> Vec<String>,
        ready: impl Fn(&Self) -> bool,
    ) -> Option<Self> {
        let mut command = program(package, path)?;
        let scratch = Scratch::new();
        let address = free_address();
        let child = command.args(arguments(&scratch, &address)).current_dir(&scratch.0).spawn().unwrap();
        let mut peer = Self { child, address, scratch };
        until(package, || {
            let ended = peer.child.try_wait().unwrap();
            assert!(ended.is_none(), "{package} ended: {ended:?}");
            ready(&peer).then_some(())
        });
        Some(peer)
    }

    pub fn prometheus() -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            std::fs::write(scratch.path("empty.yml"), "").unwrap();
            vec![
                "--config.file=empty.yml".into(),
                "--storage.tsdb.path=tsdb".into(),
                format!("--web.listen-address={address}"),
                "--web.enable-remote-write-receiver".into(),
            ]
        };
        Self::start("prometheus", "usr/bin/prometheus", arguments, |peer| peer.get("/-/ready").is_some())
    }

    pub fn victoriametrics() -> Option<Self> {
        let arguments =
            |_: &Scratch, address: &str| vec!["-storageDataPath=data".into(), format!("-httpListenAddr={address}")];
        let ready = |peer: &Self| peer.get("/health").is_some();
        Self::start("victoria-metrics", "usr/bin/victoria-metrics", arguments, ready)
    }

    /// Scrapes what a file in Prometheus' form says and sends it there.
    pub fn vmagent(config: &str, write: &str) -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            std::fs::write(scratch.path("scrape.yml"), config).unwrap();
            vec![
                "-promscrape.config=scrape.yml".into(),
                format!("-remoteWrite.url={write}"),
                "-remoteWrite.tmpDataPath=queue".into(),
                format!("-httpListenAddr={address}"),
            ]
        };
        Self::start("victoria-metrics", "usr/bin/vmagent", arguments, |peer| peer.get("/health").is_some())
    }

    /// The same with Prometheus as an agent; `config` says where it sends to.
    pub fn prometheus_agent(config: &str) -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            std::fs::write(scratch.path("agent.yml"), config).unwrap();
            vec![
                "--config.file=agent.yml".into(),
                "--enable-feature=agent".into(),
                "--storage.agent.path=agent".into(),
                format!("--web.listen-address={address}"),
            ]
        };
        Self::start("prometheus", "usr/bin/prometheus", arguments, |peer| peer.get("/-/ready").is_some())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn node_exporter() -> Option<Self> {
        // As its authors ship it; Debian leaves out loopback and what is mounted below /mnt.
        let mounts = "^/(dev|proc|run/credentials/.+|sys|var/lib/docker/.+|var/lib/containers/storage/.+)($|/)";
        let arguments = |_: &Scratch, address: &str| {
            vec![
                format!("--web.listen-address={address}"),
                format!("--collector.filesystem.mount-points-exclude={mounts}"),
                "--collector.netdev.device-exclude=^$".into(),
            ]
        };
        let (package, path) = ("prometheus-node-exporter", "usr/bin/prometheus-node-exporter");
        Self::start(package, path, arguments, |peer| peer.get("/").is_some())
    }

    pub fn clickhouse() -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            let (host, port) = address.split_once(':').unwrap();
            let directory = scratch.0.display();
            let config = format!(
                "<yandex><logger><level>none</level></logger><http_port>{port}</http_port>\
                 <listen_host>{host}</listen_host><path>{directory}/</path><tmp_path>{directory}/tmp/</tmp_path>\
                 <users_config>users.xml</users_config><default_profile>default</default_profile>\
                 <default_database>default</default_database><mark_cache_size>1048576</mark_cache_size></yandex>"
            );
            std::fs::write(scratch.path("config.xml"), config).unwrap();
            let users = "<yandex><profiles><default/></profiles><users><default><password>swordfish</password>\
                         <networks><ip>::/0</ip></networks><profile>default</profile><quota>default</quota></default>\
                         </users><quotas><default/></quotas></yandex>";
            std::fs::write(scratch.path("users.xml"), users).unwrap();
            vec![format!("--config-file={directory}/config.xml")]
        };
        let ready = |peer: &Self| peer.get("/ping").is_some();
        Self::start("clickhouse-server", "usr/sbin/clickhouse-server", arguments, ready)
    }

    /// `servers` gets the directory and a free address: nginx' configuration of its servers.
    pub fn nginx(servers: impl Fn(&Scratch, &str) -> String) -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            let directory = scratch.0.display();
            let config = format!(
                "daemon off; master_process off; pid pid; error_log error.log; events {{}} http {{ access_log off; \
                 client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; \
                 scgi_temp_path scgi; {} }}",
                servers(scratch, address)
            );
            std::fs::write(scratch.path("nginx.conf"), config).unwrap();
            vec!["-p".into(), format!("{directory}"), "-c".into(), "nginx.conf".into(), "-e".into(), "error.log".into()]
        };
        let ready = |peer: &Self| std::net::TcpStream::connect(&peer.address).is_ok();
        Self::start("nginx", "usr/sbin/nginx", arguments, ready)
    }

    /// net-snmp's agent on a UDP port; `more` is added to its configuration.
    pub fn snmpd(more: &str) -> Option<Self> {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let arguments = |scratch: &Scratch, _: &str| {
            let config = format!("agentaddress udp:{udp}\nsysName peer\nsysDescr of the tests\n{more}\n");
            std::fs::write(scratch.path("snmpd.conf"), config).unwrap();
            ["-f", "-C", "-c", "snmpd.conf", "-Lf", "log", "-p", "pid", "-M", ".", "-m", ""].map(String::from).to_vec()
        };
        let ready = |peer: &Self| {
            let log = std::fs::read_to_string(peer.scratch.path("log")).unwrap_or_default();
            log.contains("NET-SNMP version")
        };
        let mut peer = Self::start("snmpd", "usr/sbin/snmpd", arguments, ready)?;
        peer.address = udp.to_string();
        Some(peer)
    }

    /// pymodbus' server: unit 7, where holding register n has n, input register n has 65535 - n, coil n is set where n is
    /// divisible by three and discrete input n where it is by five. `framer` is its class.
    pub fn pymodbus(framer: &str) -> Option<Self> {
        let arguments = |scratch: &Scratch, address: &str| {
            let port = address.rsplit_once(':').unwrap().1;
            let script = format!(
                "from pymodbus.server import StartTcpServer\n\
                 from pymodbus.datastore import ModbusSequentialDataBlock as Block, ModbusSlaveContext, ModbusServerContext\n\
                 from pymodbus.transaction import {framer}\n\
                 unit = ModbusSlaveContext(\n\
                 \x20   di=Block(0, [n % 5 == 0 for n in range(2000)]), co=Block(0, [n % 3 == 0 for n in range(2000)]),\n\
                 \x20   hr=Block(0, list(range(3000))), ir=Block(0, [65535 - n for n in range(3000)]), zero_mode=True)\n\
                 units = ModbusServerContext(slaves={{7: unit}}, single=False)\n\
                 StartTcpServer(context=units, framer={framer}, address=('127.0.0.1', {port}))\n"
            );
            std::fs::write(scratch.path("server.py"), script).unwrap();
            vec!["server.py".into()]
        };
        let ready = |peer: &Self| std::net::TcpStream::connect(&peer.address).is_ok();
        Self::start("python3-pymodbus", "usr/bin/python3", arguments, ready)
    }

    /// snmpsim with one agent, `public`, that has these rows: an object's name, a type's number, a value; in order.
    pub fn snmpsim(rows: &str) -> Option<Self> {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let program = program("snmpsim", "usr/bin/snmpsimd")?.get_program().to_os_string().into_string().unwrap();
        let arguments = |scratch: &Scratch, _: &str| {
            for directory in ["data", "cache"] {
                std::fs::create_dir(scratch.path(directory)).unwrap();
            }
            std::fs::write(scratch.path("data/public.snmprec"), rows).unwrap();
            let mut arguments = vec![program.clone()];
            arguments.extend(
                // It wants to be told that it may stay who it is; the cache is nobody else's to read.
                ["--data-dir=data", "--cache-dir=cache", "--process-user=root", "--process-group=root"]
                    .map(String::from),
            );
            arguments.extend([format!("--agent-udpv4-endpoint={udp}"), "--logging-method=null".into()]);
            arguments
        };
        let asked = UdpSocket::bind("127.0.0.1:0").unwrap();
        asked.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let ready = |_: &Self| {
            // GetRequest of sysName.0, version 2c, community public.
            let request = b"\x30\x26\x02\x01\x01\x04\x06public\xa0\x19\x02\x01\x01\x02\x01\x00\x02\x01\x00\
                            \x30\x0e\x30\x0c\x06\x08\x2b\x06\x01\x02\x01\x01\x05\x00\x05\x00";
            let sent = asked.send_to(request, udp);
            sent.is_ok() && asked.recv(&mut [0; 1500]).is_ok()
        };
        let mut peer = Self::start("snmpsim", "usr/bin/python3", arguments, ready)?;
        peer.address = udp.to_string();
        Some(peer)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn get(&self, target: &str) -> Option<Vec<u8>> {
        self.ask("GET", target, &[], b"")
    }

    /// The body of an answer with status 200.
    pub fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Vec<u8>> {
        let url = Url::parse(&self.url()).unwrap();
        let mut client = Client::new(url, &TlsOptions::default(), Duration::from_secs(60)).unwrap();
        let request = Request { method, target, headers, body, keep: 64 << 20 };
        client.send(&request).ok().filter(|answer| answer.status == 200).map(|answer| answer.body)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One that nobody has at this moment.
pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}
