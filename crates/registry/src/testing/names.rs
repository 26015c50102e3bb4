//! A resolver whose answers are set by hand.

use std::{collections::BTreeMap, io, net::IpAddr, sync::Arc};

use parking_lot::Mutex;

use crate::{BoxFuture, Resolve};

/// Answers what it was told to. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct FakeNames {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    addresses: BTreeMap<String, Vec<IpAddr>>,
    fails: bool,
    hangs: bool,
}

impl FakeNames {
    /// All addresses of `host` from now on.
    pub fn set(&self, host: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        self.inner.lock().addresses.insert(host.to_owned(), addresses.into_iter().collect());
    }

    /// Whether every question fails.
    pub fn fail(&self, fails: bool) {
        self.inner.lock().fails = fails;
    }

    /// Whether no question is answered.
    pub fn hang(&self, hangs: bool) {
        self.inner.lock().hangs = hangs;
    }
}

impl FakeNames {
    /// `None`: never.
    fn answer(&self, host: &str) -> Option<io::Result<Vec<IpAddr>>> {
        let Inner { addresses, fails, hangs } = &*self.inner.lock();
        if *hangs {
            return None;
        }
        if *fails {
            return Some(Err(io::Error::other("the name server is away")));
        }
        let known = addresses.get(host).cloned();
        Some(known.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such name")))
    }
}

impl Resolve for FakeNames {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            match self.answer(host) {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    }
}
