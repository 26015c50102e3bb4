//! A real etcd against the suite, and what only etcd can do to a registry.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use etcd_client::{Client, GetOptions, Permission, PermissionType, TlsOptions};
use forebay_proto::{
    Secret,
    tls::{Identity, Pem, TlsFiles},
};
use forebay_registry::{
    BoxFuture, Credentials, Etcd, EtcdSettings, EtcdTls, GATEWAYS_MAX, Health, HostPort, Registry,
    conformance::{
        Announced, Harness, Presence, Seen, WAIT_MAX, address, until, until_health, until_sentence,
    },
    testing::{EtcdServer, ServerTls},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::time::timeout;

const FLEET: &str = "test";
const PREFIX: &str = "/forebay/v1/test/gateways/";
const LEASE: Duration = Duration::from_secs(2);

/// An etcd, and processes that each have a seed of their own.
struct RealEtcd {
    server: EtcdServer,
    processes: AtomicU64,
}

async fn harness() -> RealEtcd {
    RealEtcd { server: EtcdServer::start().await, processes: AtomicU64::new(0) }
}

impl RealEtcd {
    fn settings(&self) -> EtcdSettings {
        let seed = self.processes.fetch_add(1, Ordering::Relaxed);
        EtcdSettings { lease: LEASE, ..EtcdSettings::plain(vec![self.server.endpoint()], FLEET, seed) }
    }
}

impl Harness for RealEtcd {
    fn open(&self) -> Arc<dyn Registry> {
        Arc::new(Etcd::open(self.settings()).unwrap())
    }

    fn appear(&mut self, name: &str, address: HostPort) -> Box<dyn Presence> {
        Announced::announce(self.open(), name, address)
    }

    fn break_off(&mut self) -> BoxFuture<'_, ()> {
        self.server.kill();
        Box::pin(std::future::ready(()))
    }

    fn mend(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.server.restart())
    }

    fn lease(&self) -> Duration {
        LEASE
    }
}

forebay_registry::conformance!(harness();
    gateways_are_seen,
    withdrawn_gateways_go,
    the_last_gateway_goes_too,
    dropped_gateways_go,
    late_watchers_see_all,
    living_gateways_stay,
    dead_gateways_expire,
    outages_stop_changes_only,
    one_address_is_one_gateway,
    the_latest_has_the_name,
    a_restarted_gateway_is_back_at_once,
    renaming_leaves_no_gap,
    announcing_survives_an_outage,
);

async fn keys(client: &mut Client) -> Vec<(String, i64)> {
    let found = client.get(PREFIX, Some(GetOptions::new().with_prefix())).await.unwrap();
    found.kvs().iter().map(|pair| (pair.key_str().unwrap().to_owned(), pair.lease())).collect()
}

/// Waits until `gw-1` is there under another lease than `before`.
async fn until_registered_anew(client: &mut Client, before: i64) {
    let waited = timeout(WAIT_MAX, async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        while !keys(client).await.iter().any(|(key, lease)| key.ends_with("/gw-1") && *lease != before) {
            tick.tick().await;
        }
    });
    waited.await.expect("registered anew");
}

#[tokio::test]
async fn records_lie_where_they_are_documented_and_goodbye_takes_them_and_their_lease() {
    let mut etcd = harness().await;
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let one = etcd.appear("gw-1", address(1));
    seen.until([1]).await;
    let mut client = etcd.server.client().await;
    let found = client.get(format!("{PREFIX}gw-1"), None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), r#"{"address":"127.0.0.1:7070"}"#);
    assert_eq!(client.leases().await.unwrap().leases().len(), 1);
    one.withdraw().await;
    // No waiting: when it returns, etcd has taken it.
    assert_eq!(keys(&mut client).await, []);
    assert_eq!(client.leases().await.unwrap().leases().len(), 0);
}

/// Stopped for longer than a lease, etcd lets all leases lapse when it goes on, before anybody can renew one.
#[tokio::test]
async fn an_etcd_that_was_stopped_for_longer_than_a_lease_loses_nobody() {
    let mut etcd = harness().await;
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let _presences = [etcd.appear("gw-1", address(1)), etcd.appear("gw-2", address(2))];
    seen.until([1, 2]).await;
    until_health(&*registry, Health::Current).await;
    etcd.server.pause();
    until_health(&*registry, Health::Away).await;
    until("an outage of a lease and more", || registry.state().age.is_some_and(|age| age > LEASE * 3 / 2))
        .await;
    assert_eq!(seen.now(), [1, 2].into());
    etcd.server.go_on();
    until_health(&*registry, Health::Current).await;
    // One that comes now is seen at once.
    let _three = etcd.appear("gw-3", address(3));
    seen.until([1, 2, 3]).await;
    // Beyond the time for which absence is doubtful, too.
    let gap = timeout(LEASE * 3 / 2, seen.until([])).await;
    assert!(gap.is_err(), "{:?}", seen.history);
    let all_there = seen.history.iter().skip_while(|set| set.len() < 2).all(|set| set.len() >= 2);
    assert!(all_there && seen.now() == [1, 2, 3].into(), "{:?}", seen.history);
}

#[tokio::test]
async fn a_lost_lease_is_registered_again() {
    let mut etcd = harness().await;
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let _one = etcd.appear("gw-1", address(1));
    seen.until([1]).await;
    let mut client = etcd.server.client().await;
    let (_, lease) = keys(&mut client).await[0];
    client.lease_revoke(lease).await.unwrap();
    seen.until([]).await;
    seen.until([1]).await;
    until_registered_anew(&mut client, lease).await;
}

#[tokio::test]
async fn a_deleted_record_is_put_back() {
    let mut etcd = harness().await;
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let _one = etcd.appear("gw-1", address(1));
    seen.until([1]).await;
    let mut client = etcd.server.client().await;
    client.delete(format!("{PREFIX}gw-1"), None).await.unwrap();
    seen.until([]).await;
    seen.until([1]).await;
}

/// A backup that is older than the fleet: no keys, no leases, and a revision that went back.
#[tokio::test]
async fn an_etcd_that_lost_its_data_is_filled_again() {
    let mut etcd = harness().await;
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let _presences = [etcd.appear("gw-1", address(1)), etcd.appear("gw-2", address(2))];
    seen.until([1, 2]).await;
    etcd.server.kill();
    until_health(&*registry, Health::Away).await;
    etcd.server.wipe();
    etcd.server.restart().await;
    until_health(&*registry, Health::Current).await;
    let mut client = etcd.server.client().await;
    until_registered_anew(&mut client, 0).await;
    let _three = etcd.appear("gw-3", address(3));
    seen.until([1, 2, 3]).await;
    assert!(
        seen.history.iter().skip_while(|set| set.len() < 2).all(|set| set.len() >= 2),
        "{:?}",
        seen.history
    );
}

#[tokio::test]
async fn records_of_others_are_skipped_and_counted() {
    let mut etcd = harness().await;
    let mut client = etcd.server.client().await;
    client.put(format!("{PREFIX}garbage"), "no record", None).await.unwrap();
    client.put([PREFIX.as_bytes(), b"\xff"].concat(), "no name", None).await.unwrap();
    client.put("/forebay/v1/test/other/gw-9", r#"{"address":"127.0.0.9:1"}"#, None).await.unwrap();
    client.put("/forebay/v1/other/gateways/gw-9", r#"{"address":"127.0.0.9:1"}"#, None).await.unwrap();
    let registry = etcd.open();
    let mut seen = Seen::by(&*registry);
    let _one = etcd.appear("gw-1", address(1));
    seen.until([1]).await;
    let sentence = registry.state().sentence;
    assert!(
        sentence.ends_with(
            "fleet test: 1 gateways are registered; 1 records cannot be read, the first of gateway garbage"
        ),
        "{sentence}"
    );
}

#[tokio::test]
async fn more_gateways_than_the_bound_are_not_taken() {
    let etcd = harness().await;
    let mut client = etcd.server.client().await;
    for n in 0..GATEWAYS_MAX + 10 {
        client.put(format!("{PREFIX}gw-{n:04}"), r#"{"address":"127.0.0.9:1"}"#, None).await.unwrap();
    }
    let registry = etcd.open();
    let set = registry.watch().next().await.unwrap();
    assert_eq!(set.len(), GATEWAYS_MAX);
    assert!(
        registry.state().sentence.ends_with("more than 256, the rest is ignored"),
        "{}",
        registry.state().sentence
    );
}

#[tokio::test]
async fn a_dead_or_silent_member_is_passed_over() {
    let etcd = harness().await;
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_endpoint = HostPort::from(silent.local_addr().unwrap());
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().map(HostPort::from).unwrap();
    // Whichever is first.
    for seed in 0..3 {
        let endpoints = vec![silent_endpoint.clone(), closed.clone(), etcd.server.endpoint()];
        let settings = EtcdSettings { lease: LEASE, ..EtcdSettings::plain(endpoints, FLEET, seed) };
        let registry: Arc<dyn Registry> = Arc::new(Etcd::open(settings).unwrap());
        let mut seen = Seen::by(&*registry);
        let one = Announced::announce(Arc::clone(&registry), "gw-1", address(1));
        seen.until([1]).await;
        until_health(&*registry, Health::Current).await;
        one.withdraw().await;
        seen.until([]).await;
    }
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_named_with_the_reason() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().map(HostPort::from).unwrap();
    let settings = EtcdSettings { lease: LEASE, ..EtcdSettings::plain(vec![closed.clone()], FLEET, 1) };
    let registry = Etcd::open(settings).unwrap();
    let start = format!("etcd at {closed}: ");
    until("a reason", || registry.state().sentence.starts_with(&start)).await;
    let state = registry.state();
    assert!(state.sentence.contains("refused"), "{}", state.sentence);
    assert_eq!((state.health, state.age), (Health::Starting, None));
    assert!(registry.watch().current().is_none(), "unknown is not empty");
}

#[tokio::test]
async fn fleets_do_not_see_each_other() {
    let mut etcd = harness().await;
    let other = EtcdSettings { fleet: "other".to_owned(), ..etcd.settings() };
    let other: Arc<dyn Registry> = Arc::new(Etcd::open(other).unwrap());
    let registry = etcd.open();
    let _one = etcd.appear("gw", address(1));
    let _two = Announced::announce(Arc::clone(&other), "gw", address(2));
    let (mut seen, mut seen_by_other) = (Seen::by(&*registry), Seen::by(&*other));
    seen.until([1]).await;
    seen_by_other.until([2]).await;
    let mixed = |seen: &Seen| seen.history.iter().any(|set| set.len() > 1);
    assert!(!mixed(&seen) && !mixed(&seen_by_other));
}

#[tokio::test]
async fn users_are_authenticated_and_refusals_are_told() {
    let etcd = harness().await;
    let mut admin = etcd.server.client().await;
    admin.user_add("root", "root", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.role_add("gateways").await.unwrap();
    let own = Permission::new(PermissionType::Readwrite, PREFIX).with_prefix();
    admin.role_grant_permission("gateways", own).await.unwrap();
    admin.user_add("forebay", "geheim", None).await.unwrap();
    admin.user_grant_role("forebay", "gateways").await.unwrap();
    admin.auth_enable().await.unwrap();

    let with = |user: &str, password: &str, fleet: &str| {
        let credentials = Credentials { user: user.to_owned(), password: Secret::new(password) };
        let settings =
            EtcdSettings { credentials: Some(credentials), fleet: fleet.to_owned(), ..etcd.settings() };
        Arc::new(Etcd::open(settings).unwrap())
    };
    let registry: Arc<dyn Registry> = with("forebay", "geheim", FLEET);
    let mut seen = Seen::by(&*registry);
    let one = Announced::announce(Arc::clone(&registry), "gw-1", address(1));
    seen.until([1]).await;
    one.withdraw().await;
    seen.until([]).await;

    for (registry, reason) in [
        (with("forebay", "wrong", FLEET), "authentication failed"),
        (with("forebay", "geheim", "other"), "permission denied"),
        (Arc::new(Etcd::open(etcd.settings()).unwrap()), "user name is empty"),
    ] {
        until_sentence(&*registry, reason).await;
        assert!(!registry.state().sentence.contains("geheim"));
    }
}

/// A CA, and files signed by it in a folder.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, folder: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Paths of a CA, a certificate and its key.
    fn files(&self, name: &str) -> (PathBuf, PathBuf, PathBuf) {
        let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (
            self.write("ca.pem", &self.issuer.pem()),
            self.write(&format!("{name}.pem"), &cert.pem()),
            self.write(&format!("{name}.key"), &key.serialize_pem()),
        )
    }

    fn tls(&self, name: &str) -> TlsFiles {
        let (ca, cert, key) = self.files(name);
        TlsFiles::read(&ca, Some((&cert, &key))).unwrap()
    }
}

#[tokio::test]
async fn etcd_is_spoken_to_over_mutual_tls() {
    let authority = Authority::new("fleet");
    let (ca, cert, key) = authority.files("server");
    let client: TlsOptions = authority.tls("admin").client(None);
    let server = EtcdServer::start_with(Some(ServerTls { ca, cert, key, client })).await;
    let open = |files: TlsFiles, server_name: Option<&str>| -> Arc<dyn Registry> {
        let tls = Some(EtcdTls { files, server_name: server_name.map(str::to_owned) });
        let plain = EtcdSettings::plain(vec![server.endpoint()], FLEET, 1);
        Arc::new(Etcd::open(EtcdSettings { tls, lease: LEASE, ..plain }).unwrap())
    };
    for server_name in [None, Some("localhost")] {
        let registry = open(authority.tls("gateway"), server_name);
        let mut seen = Seen::by(&*registry);
        let one = Announced::announce(Arc::clone(&registry), "gw-1", address(1));
        seen.until([1]).await;
        one.withdraw().await;
        seen.until([]).await;
    }
    let foreign = Authority::new("stranger");
    let believes_fleet = Pem::read(&authority.files("gateway").0).unwrap();
    let (_, cert, key) = foreign.files("stranger");
    let identity = Identity { cert: Pem::read(&cert).unwrap(), key: Pem::read(&key).unwrap() };
    for (what, registry, reason) in [
        ("another CA", open(foreign.tls("gateway"), None), "UnknownIssuer"),
        ("another name", open(authority.tls("gateway"), Some("other.example")), "not valid for name"),
        ("a stranger's certificate", open(TlsFiles::new(believes_fleet, Some(identity)).unwrap(), None), ""),
    ] {
        until_sentence(&*registry, reason).await;
        assert_eq!(registry.state().health, Health::Starting, "{what}");
        assert!(registry.watch().current().is_none(), "{what}");
    }
}
