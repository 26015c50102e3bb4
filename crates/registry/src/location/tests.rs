use std::io::Write as _;

use super::*;

fn parsed(url: &str) -> EtcdLocation {
    EtcdLocation::parse(url).expect(url)
}

fn hosts(location: &EtcdLocation) -> String {
    location.endpoints.iter().map(HostPort::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn join_lists_are_read() {
    let names = parse_join(" a.example:1,10.0.0.7:2 , [fd00::7]:3,").expect("a list");
    assert_eq!(
        names.iter().map(HostPort::to_string).collect::<Vec<_>>(),
        ["a.example:1", "10.0.0.7:2", "[fd00::7]:3"]
    );
    let refused = |list: &str| parse_join(list).expect_err(list).to_string();
    assert!(refused("").starts_with("no gateway to join: write HOST:PORT"));
    assert!(refused("a.example").starts_with("`a.example` is not HOST:PORT: write, for instance"));
    assert!(refused(&"h:1,".repeat(65)).starts_with("65 names to join, at most 64"));
}

#[test]
fn etcd_urls_are_read() {
    #[rustfmt::skip]
    let rows = [
        // url                                            endpoints                        fleet
        ("etcd://10.0.0.7:2379/prod",                     "10.0.0.7:2379",                 "prod"),
        ("etcd://etcd.example/prod/",                     "etcd.example:2379",             "prod"),
        ("etcd://etcd.example",                           "etcd.example:2379",             "default"),
        ("etcd://a:1,b,[fd00::7]:3,[fd00::8]/prod.eu_1",  "a:1 b:2379 [fd00::7]:3 [fd00::8]:2379", "prod.eu_1"),
    ];
    for (url, endpoints, fleet) in rows {
        let location = parsed(url);
        assert_eq!((hosts(&location).as_str(), location.fleet.as_str()), (endpoints, fleet), "{url}");
        assert_eq!((location.lease, location.user, location.ca), (LEASE_DEFAULT, None, None), "{url}");
    }
}

#[test]
fn etcd_urls_carry_users_tls_and_a_lease() {
    let url = "etcd://for%65bay:p%40ss:w@rd@a:1/f?lease_seconds=3&ca=/etc/ca%20file.pem&cert=c.pem&key=k.pem&\
               server_name=etcd.example";
    let location = parsed(url);
    assert_eq!(location.user.as_deref(), Some("forebay"));
    assert_eq!(location.password.as_ref().map(Secret::expose), Some("p@ss:w@rd"));
    assert_eq!(location.lease, Duration::from_secs(3));
    assert_eq!(location.ca.as_deref(), Some(Path::new("/etc/ca file.pem")));
    assert_eq!(location.identity, Some(("c.pem".into(), "k.pem".into())));
    assert_eq!(location.server_name.as_deref(), Some("etcd.example"));
    assert!(!format!("{location:?}").contains("p@ss"), "{location:?}");
    let by_file = parsed("etcd://forebay@a:1/f?password_file=/run/secrets/etcd");
    assert_eq!(by_file.password_file.as_deref(), Some(Path::new("/run/secrets/etcd")));
}

#[test]
fn wrong_etcd_urls_say_what_to_write() {
    #[rustfmt::skip]
    let rows = [
        ("http://a:1/f",                       "a registry's URL begins with etcd://, not with http; write etcd://HOST:PORT/FLEET"),
        ("a:1",                                "a registry's URL begins with etcd://, not with no scheme"),
        ("etcd://",                            "the URL of etcd has no host; write etcd://HOST:PORT/FLEET"),
        ("etcd:///prod",                       "the URL of etcd has no host"),
        ("etcd://a:port/f",                    "`a:port` is not HOST:PORT"),
        ("etcd://a:1/f/g",                     "`f/g` is not a fleet's name"),
        ("etcd://@a:1/f",                      "the URL of etcd has an @, but no user before it"),
        ("etcd://u:%zz@a:1/f",                 "user or password in the URL of etcd cannot be read"),
        ("etcd://u@a:1/f",                     "the user of etcd has no password: add ?password_file=PATH"),
        ("etcd://u:geheim@a:1/f?password_file=p", "a password in the URL of etcd and password_file= exclude each other"),
        ("etcd://a:1/f?password_file=p",       "password_file= needs a user"),
        ("etcd://a:1/f?lease_seconds=0",       "lease_seconds in the URL of etcd is a whole number from 1 to 600"),
        ("etcd://a:1/f?lease_seconds=soon",    "lease_seconds in the URL of etcd is a whole number from 1 to 600"),
        ("etcd://a:1/f?cert=c&ca=x",           "cert= and key= in the URL of etcd go together"),
        ("etcd://a:1/f?cert=c&key=k",          "TLS to etcd needs ca=PATH"),
        ("etcd://a:1/f?server_name=n",         "TLS to etcd needs ca=PATH"),
        ("etcd://a:1/f?ttl=3",                 "`ttl` in the URL of etcd is not known: there are lease_seconds, password_file"),
        ("etcd://a:1/f?ca",                    "`ca` in the URL of etcd has no value: write ca=…"),
        ("etcd://a:1/f?ca=",                   "the value of ca in the URL of etcd cannot be read"),
        ("etcd://u:geheim@a:port/f",           "`a:port` is not HOST:PORT"),
        ("etcd://u:geheim@a:1/f g",            "`f g` is not a fleet's name"),
        ("etcd://u:geheim@a:1/f?what=geheim",  "`what` in the URL of etcd is not known"),
    ];
    for (url, wrong) in rows {
        let error = EtcdLocation::parse(url).expect_err(url).to_string();
        assert!(error.starts_with(wrong), "{url}: {error}");
        assert!(!error.contains("geheim"), "{url}: {error}");
    }
}

#[test]
fn files_are_read_when_settings_are_made() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"geheim\nsecond line\n").expect("room");
    let location = parsed(&format!("etcd://u@a:1/f?password_file={}", file.path().display()));
    let settings = location.settings(7).expect("a good file");
    let credentials = settings.credentials.as_ref().expect("a user");
    assert_eq!((credentials.user.as_str(), credentials.password.expose()), ("u", "geheim"));
    assert!(!format!("{settings:?}").contains("geheim"), "{settings:?}");

    let absent = parsed("etcd://u@a:1/f?password_file=/nonexistent/etcd");
    assert_eq!(
        absent.settings(7).expect_err("no file").to_string(),
        "cannot read the password file /nonexistent/etcd"
    );
    let no_ca = parsed("etcd://a:1/f?ca=/nonexistent/ca.pem");
    assert_eq!(no_ca.settings(7).expect_err("no file").to_string(), "cannot read /nonexistent/ca.pem");
    let empty = tempfile::NamedTempFile::new().expect("a file");
    let location = parsed(&format!("etcd://u@a:1/f?password_file={}", empty.path().display()));
    let error = location.settings(7).expect_err("empty");
    assert!(std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("0 bytes")));
}
