use std::time::SystemTime;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};

use super::*;

fn ca(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn params() -> CertificateParams {
    CertificateParams::new(vec!["localhost".to_owned()]).unwrap()
}

struct Files {
    ca: Pem,
    cert: Pem,
    key: Pem,
}

fn files(issuer: &CertifiedIssuer<'static, KeyPair>, params: &CertificateParams) -> Files {
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, issuer).unwrap();
    Files {
        ca: Pem::new("/etc/forebay/ca.pem", issuer.pem()),
        cert: Pem::new("/etc/forebay/cert.pem", cert.pem()),
        key: Pem::new("/etc/forebay/key.pem", key.serialize_pem()),
    }
}

#[test]
fn each_wrong_file_is_named_with_what_is_wrong() {
    let issuer = ca("fleet");
    let good = || files(&issuer, &params());
    let refused = |ca: Pem, cert: Pem, key: Pem| {
        TlsFiles::new(ca, Some(Identity { cert, key })).expect_err("refused").to_string()
    };
    let Files { ca, cert, key } = good();
    assert!(TlsFiles::new(ca.clone(), Some(Identity { cert: cert.clone(), key: key.clone() })).is_ok());

    let empty = || Pem::new("/etc/forebay/empty.pem", "");
    let torn = Pem::new("/etc/forebay/torn.pem", &cert.bytes[..cert.bytes.len() / 2]);
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let garbage = Pem::new(
        "/etc/forebay/garbage.pem",
        "-----BEGIN CERTIFICATE-----\nAAAAAAAA\n-----END CERTIFICATE-----\n",
    );
    let rows = [
        (refused(empty(), cert.clone(), key.clone()), "/etc/forebay/empty.pem has no certificate in it"),
        (
            refused(key.clone(), cert.clone(), key.clone()),
            "/etc/forebay/key.pem has no certificate in it, but a private key: is it the key's file?",
        ),
        (refused(ca.clone(), torn, key.clone()), "/etc/forebay/torn.pem is not valid PEM: "),
        (
            refused(ca.clone(), garbage, key),
            "/etc/forebay/garbage.pem has a certificate (number 1) that cannot be read: ",
        ),
        (refused(ca.clone(), cert.clone(), empty()), "/etc/forebay/empty.pem has no private key in it"),
        (
            refused(ca.clone(), cert.clone(), cert.clone()),
            "/etc/forebay/cert.pem has no private key in it, but a certificate: is it the certificate's file?",
        ),
        (
            refused(ca.clone(), cert.clone(), Pem::new("/etc/forebay/key.pem", encrypted)),
            "/etc/forebay/key.pem is encrypted: write the key without a passphrase",
        ),
        (
            refused(ca.clone(), cert, good().key),
            "/etc/forebay/key.pem is not the key of the certificate in /etc/forebay/cert.pem",
        ),
    ];
    for (error, start) in rows {
        assert!(error.starts_with(start), "{error}");
    }
    assert!(matches!(TlsFiles::new(ca, None).expect("a client's").server(), Err(TlsError::NoIdentity)));
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let error = TlsFiles::read(Path::new("/nonexistent/ca.pem"), None).expect_err("not there");
    assert_eq!(error.to_string(), "cannot read /nonexistent/ca.pem");
    assert!(std::error::Error::source(&error).is_some());
    let endless = Pem::read(Path::new("/dev/zero")).expect_err("no end").to_string();
    assert_eq!(endless, "/dev/zero is larger than 1048576 bytes: not a PEM file");
}

#[test]
fn objections_are_those_of_peers() {
    let issuer = ca("fleet");
    let now = UnixTime::since_unix_epoch(SystemTime::UNIX_EPOCH.elapsed().unwrap());
    let objection = |change: fn(&mut CertificateParams)| {
        let mut params = params();
        change(&mut params);
        let Files { ca, cert, key } = files(&issuer, &params);
        TlsFiles::new(ca, Some(Identity { cert, key })).expect("well-formed").objection(now)
    };
    let says = |objection: Option<String>, part: &str| {
        let objection = objection.expect("an objection");
        assert!(objection.starts_with("/etc/forebay/cert.pem") && objection.contains(part), "{objection}");
    };
    assert_eq!(objection(|_| ()), None);
    assert_eq!(
        objection(|params| params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth]),
        None
    );
    says(objection(|params| params.not_after = date_time_ymd(2000, 1, 1)), "has expired");
    says(objection(|params| params.not_before = date_time_ymd(4000, 1, 1)), "is not valid yet");

    let Files { cert, key, .. } = files(&issuer, &params());
    let other = Pem::new("/etc/forebay/other.pem", ca("other").pem());
    let foreign = TlsFiles::new(other, Some(Identity { cert, key })).expect("well-formed");
    says(foreign.objection(now), "was not signed by the CA in /etc/forebay/other.pem");
}

#[test]
fn debug_shows_paths_only() {
    let Files { ca, cert, key } = files(&ca("fleet"), &params());
    let printed = format!("{:?}", TlsFiles::new(ca, Some(Identity { cert, key })).expect("well-formed"));
    assert!(printed.contains("/etc/forebay/key.pem") && !printed.contains("PRIVATE"), "{printed}");
}
