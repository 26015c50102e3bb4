//! A real etcd for tests: on free ports of the loopback, with its data in a folder of its own.

use std::{
    io,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use etcd_client::{Client, ConnectOptions};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::{interval, timeout};

use crate::HostPort;

/// How long it may take to serve; it takes a tenth of a second on an idle machine.
const START_MAX: Duration = Duration::from_secs(30);
/// How often other ports are tried when somebody took those that were free.
const PORTS_MAX: usize = 10;

/// Files for an etcd that serves TLS and asks its clients for certificates.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// The CA of its clients.
    pub ca: PathBuf,
    /// Its certificate, good for `localhost` and 127.0.0.1.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// How readiness is asked for.
    pub client: etcd_client::TlsOptions,
}

/// A running etcd, one member with everything else at its default but its clock, which ticks five times as fast so that
/// it elects itself at once and takes leases of 1 s. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct EtcdServer {
    child: Option<Child>,
    data: TempDir,
    ports: Ports,
    tls: Option<ServerTls>,
}

#[derive(Debug, Clone, Copy)]
struct Ports {
    client: u16,
    peer: u16,
}

impl Ports {
    /// Two that are free now; etcd does not take port 0.
    fn free() -> Self {
        let bind = || TcpListener::bind(("127.0.0.1", 0)).expect("the loopback has free ports");
        let port = |listener: &TcpListener| listener.local_addr().expect("bound").port();
        let (client, peer) = (bind(), bind());
        Self { client: port(&client), peer: port(&peer) }
    }
}

impl EtcdServer {
    /// Starts one and waits until it serves.
    ///
    /// # Panics
    /// There is no `etcd` in the PATH, or it does not serve in time.
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// As [`EtcdServer::start`], with TLS.
    ///
    /// # Panics
    /// As [`EtcdServer::start`].
    pub async fn start_with(tls: Option<ServerTls>) -> Self {
        for _ in 0..PORTS_MAX {
            let data = tempfile::Builder::new()
                .prefix("forebay-etcd-")
                .tempdir()
                .expect("a folder for temporary files");
            let mut server = Self { child: None, data, ports: Ports::free(), tls: tls.clone() };
            server.spawn();
            if server.serves().await {
                return server;
            }
            let log = server.log();
            assert!(log.contains("address already in use"), "etcd did not start:\n{log}");
        }
        panic!("no ports stayed free for etcd in {PORTS_MAX} attempts");
    }

    /// Where it serves.
    pub fn endpoint(&self) -> HostPort {
        HostPort::new("127.0.0.1", self.ports.client).expect("an address")
    }

    /// A client of its administrator, as long as authentication is off.
    ///
    /// # Panics
    /// It cannot be dialled.
    pub async fn client(&self) -> Client {
        let options = ConnectOptions::new().with_connect_timeout(Duration::from_secs(3));
        let (scheme, options) = match &self.tls {
            Some(tls) => ("https", options.with_tls(tls.client.clone())),
            None => ("http", options),
        };
        let url = format!("{scheme}://{}", self.endpoint());
        Client::connect([url], Some(options)).await.expect("a URL")
    }

    /// Kills it at once; its data stays.
    ///
    /// # Panics
    /// It is not running.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("running");
        end(&mut child);
    }

    /// Starts it again on its ports with its data, and waits until it serves.
    ///
    /// # Panics
    /// It runs, or does not serve in time.
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "kill it first");
        for _ in 0..PORTS_MAX {
            self.spawn();
            if self.serves().await {
                return;
            }
        }
        panic!("etcd did not start again:\n{}", self.log());
    }

    /// Removes all that it knows, as a restored backup of a younger fleet would. It must have been killed.
    ///
    /// # Panics
    /// It runs.
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "kill it first");
        std::fs::remove_dir_all(self.data.path().join("data")).expect("its data");
    }

    /// Stops it without ending it: its connections stay, and nothing answers.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on after [`EtcdServer::pause`].
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("running");
        kill_process(Pid::from_child(child), signal).expect("an own child");
    }

    fn spawn(&mut self) {
        let Ports { client, peer } = self.ports;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let (client, peer) = (format!("{scheme}://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let log = std::fs::File::create(self.data.path().join("log")).expect("its folder");
        let mut command = Command::new("etcd");
        command
            .args(["--name", "test", "--logger", "zap", "--log-level", "warn"])
            .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
            // Its passwords guard nothing, and their usual cost is more than a busy machine has in time.
            .args(["--bcrypt-cost", "4"])
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(ServerTls { ca, cert, key, client: _ }) = &self.tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
        }
        match command.spawn() {
            Ok(child) => self.child = Some(child),
            Err(error) if error.kind() == io::ErrorKind::NotFound => panic!(
                "there is no `etcd` in the PATH: these tests run against a real one; install Debian's package \
                 `etcd-server`"
            ),
            Err(error) => panic!("etcd cannot be started: {error}"),
        }
    }

    /// Waits until it answers a read that needs a leader; `false` if it ended before.
    async fn serves(&mut self) -> bool {
        let serves = timeout(START_MAX, async {
            let mut tick = interval(Duration::from_millis(20));
            loop {
                tick.tick().await;
                let child = self.child.as_mut().expect("spawned");
                if child.try_wait().expect("an own child").is_some() {
                    self.child = None;
                    return false;
                }
                let mut client = self.client().await;
                if matches!(timeout(Duration::from_secs(1), client.get("ready", None)).await, Ok(Ok(_))) {
                    return true;
                }
            }
        });
        serves.await.unwrap_or_else(|_| panic!("etcd did not serve within {START_MAX:?}:\n{}", self.log()))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.data.path().join("log")).unwrap_or_default()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// Kills one child, stopped or not, and waits for its end.
fn end(child: &mut Child) {
    // Each fails only if it has ended already.
    _ = child.kill();
    _ = child.wait();
}
