//! The ids of requests that are being answered.

use std::{collections::HashSet, sync::Arc};

use forebay_types::RequestId;
use parking_lot::Mutex;

/// Keeps two live requests from having one id. Bounded by the requests in flight; locked twice a request.
#[derive(Debug, Default)]
pub(crate) struct LiveIds(Mutex<HashSet<RequestId>>);

/// An id that is in use until this is dropped.
#[derive(Debug)]
pub(crate) struct LiveId {
    ids: Arc<LiveIds>,
    id: RequestId,
}

/// Longest `x-request-id` that is accepted.
const ID_BYTES_MAX: usize = 128;

impl LiveIds {
    /// Takes the id that a client wishes if it is well formed, else a new one. A wish that is in use gets a suffix.
    pub(crate) fn take(self: &Arc<Self>, wish: Option<&[u8]>, mut draw: impl FnMut() -> u64) -> LiveId {
        let wish = wish
            .filter(|id| !id.is_empty() && id.len() <= ID_BYTES_MAX && id.iter().all(u8::is_ascii_graphic));
        match wish.and_then(|id| std::str::from_utf8(id).ok()) {
            Some(wish) => self.reserve(&wish.into(), draw),
            None => self.reserve(&format!("req-{:016x}", draw()).into(), draw),
        }
    }

    /// Takes an id for one of several prompts of the request `whole`: its own with the prompt's index.
    pub(crate) fn take_part(
        self: &Arc<Self>,
        whole: &RequestId,
        index: usize,
        draw: impl FnMut() -> u64,
    ) -> LiveId {
        self.reserve(&format!("{whole}-{index}").into(), draw)
    }

    fn reserve(self: &Arc<Self>, wish: &RequestId, mut draw: impl FnMut() -> u64) -> LiveId {
        let mut ids = self.0.lock();
        let mut id = wish.clone();
        while !ids.insert(id.clone()) {
            id = format!("{wish}-{:08x}", draw() >> 32).into();
        }
        LiveId { ids: self.clone(), id }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().len()
    }
}

impl LiveId {
    pub(crate) fn id(&self) -> &RequestId {
        &self.id
    }
}

impl Drop for LiveId {
    fn drop(&mut self) {
        self.ids.0.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_accepted_replaced_and_made_unique() {
        let live = Arc::new(LiveIds::default());
        let mut drawn = 0_u64;
        let mut draw = || {
            drawn += 1;
            drawn << 32
        };
        let first = live.take(Some(b"mine"), &mut draw);
        let second = live.take(Some(b"mine"), &mut draw);
        assert_eq!((first.id().as_str(), second.id().as_str()), ("mine", "mine-00000001"));
        drop(first);
        assert_eq!(live.take(Some(b"mine"), &mut draw).id().as_str(), "mine", "free again");
        for bad in [b"".as_slice(), b"has space", b"bell\x07", "é".as_bytes(), &[b'x'; 129]] {
            assert!(live.take(Some(bad), &mut draw).id().as_str().starts_with("req-"), "{bad:?}");
        }
        assert_eq!(live.take(Some(&[b'x'; 128]), &mut draw).id().as_str().len(), 128);
        let parts = [0, 1].map(|index| live.take_part(second.id(), index, &mut draw));
        assert_eq!(parts[1].id().as_str(), "mine-00000001-1");
        drop(parts);
        drop(second);
        assert_eq!(live.len(), 0);
    }
}
