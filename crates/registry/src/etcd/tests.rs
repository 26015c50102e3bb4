//! What cannot be seen from outside: the way back from a compacted history.

use std::sync::Arc;

use super::{
    dial::Dialer,
    follow::{Follower, WatchEnd},
    view::View,
    *,
};
use crate::testing::EtcdServer;

#[tokio::test]
async fn a_watch_from_a_compacted_revision_leads_back_to_the_list() {
    let server = EtcdServer::start().await;
    let mut admin = server.client().await;
    for n in 0..5 {
        admin.put("something else", format!("{n}"), None).await.unwrap();
    }
    let revision = admin.get("something else", None).await.unwrap().header().unwrap().revision();
    admin.compact(revision, None).await.unwrap();

    let settings = Arc::new(EtcdSettings::plain(vec![server.endpoint()], "test", 1));
    let mut dialer = Dialer::new(Arc::clone(&settings), 1);
    let mut client = dialer.connect().await.unwrap();
    let publisher = Publisher::new(String::new());
    let mut follower = Follower { view: View::new(settings.lease), settings, publisher };
    let end = follower.watch(&mut client, &mut dialer, 1).await;
    assert_eq!(end, Ok(WatchEnd::Compacted));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let good = EtcdSettings::plain(vec!["h:1".parse().unwrap()], "prod", 1);
    assert!(good.check().is_ok());
    let refused = |settings: EtcdSettings| settings.check().expect_err("refused").to_string();
    assert_eq!(
        refused(EtcdSettings { endpoints: vec![], ..good.clone() }),
        "0 endpoints of etcd: give 1 to 16, as HOST:PORT"
    );
    assert_eq!(
        refused(EtcdSettings { lease: Duration::from_millis(900), ..good.clone() }),
        "a lease of 900ms: give 1 to 600 seconds"
    );
    assert!(
        refused(EtcdSettings { fleet: "a/b".to_owned(), ..good.clone() })
            .starts_with("`a/b` is not a fleet's name")
    );
    let odd = EtcdSettings { lease: Duration::from_millis(2_500), ..good };
    assert_eq!(odd.lease_seconds(), 3, "rounded up: never shorter than was asked for");
}
