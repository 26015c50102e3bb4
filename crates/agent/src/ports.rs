//! Free ports for an engine that is about to start.
//!
//! An engine takes its ports up to minutes after they were chosen. They are therefore below Linux's ephemeral range, so
//! that no outgoing connection takes one in between; agents of one state folder leave each other's alone; and a life
//! takes those of the one before, if they are still free, so that its address stays.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, TcpListener},
    ops::Range,
};

use crate::command::{PortWish, Ports};

/// Where ports are looked for.
pub const PORTS: Range<u16> = 20_000..32_000;
/// Tries for each wish.
const TRIES_MAX: u32 = 1_000;

/// The first port of each wish. `random` starts the search; it need not be good.
///
/// # Errors
/// There are not enough.
pub fn choose(wishes: &[PortWish], prefer: &Ports, others: &[u16], random: u64) -> io::Result<Ports> {
    let mut taken: BTreeSet<u16> = others.iter().copied().collect();
    let mut chosen = Ports::new();
    let mut dice = random;
    for &PortWish { purpose, count } in wishes {
        let mut free = |first: u16| {
            let ports = first..first.checked_add(count)?;
            let fits = ports.end <= PORTS.end
                && ports.clone().all(|port| !taken.contains(&port))
                && all_free(ports.clone());
            fits.then(|| taken.extend(ports)).map(|()| first)
        };
        let span = u64::from(PORTS.end.saturating_sub(count).saturating_sub(PORTS.start)).max(1);
        let draw = || {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            PORTS.start + ((dice >> 33) % span) as u16
        };
        let before = prefer.get(&purpose).copied().into_iter();
        let draws = std::iter::repeat_with(draw).take(TRIES_MAX as usize);
        let first = before.chain(draws).find_map(&mut free).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("no {count} free ports in a row within {PORTS:?}"),
            )
        })?;
        chosen.insert(purpose, first);
    }
    Ok(chosen)
}

/// Held all at once, so that a port is not counted twice.
fn all_free(ports: Range<u16>) -> bool {
    let listeners: Result<Vec<_>, _> =
        ports.map(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).collect();
    listeners.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Purpose;

    const WISHES: [PortWish; 2] =
        [PortWish { purpose: Purpose::Http, count: 1 }, PortWish { purpose: Purpose::Events, count: 4 }];

    #[test]
    fn ports_are_free_apart_and_within_the_range() {
        let ports = choose(&WISHES, &Ports::new(), &[], 7).expect("some are free");
        let (http, events) = (ports[&Purpose::Http], ports[&Purpose::Events]);
        assert!(!(events..events + 4).contains(&http));
        assert!(PORTS.contains(&http) && PORTS.contains(&(events + 3)));
    }

    #[test]
    fn the_last_life_s_ports_are_taken_again_unless_somebody_has_them() {
        let before = choose(&WISHES, &Ports::new(), &[], 8).expect("some are free");
        assert_eq!(choose(&WISHES, &before, &[], 9).expect("still free"), before);
        let others = choose(&WISHES, &before, &[before[&Purpose::Events] + 2], 9).expect("some are free");
        assert_eq!(others[&Purpose::Http], before[&Purpose::Http]);
        assert_ne!(others[&Purpose::Events], before[&Purpose::Events], "another agent has one of them");
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, before[&Purpose::Http])).expect("free");
        let third = choose(&WISHES, &before, &[], 9).expect("some are free");
        assert_ne!(third[&Purpose::Http], before[&Purpose::Http], "somebody listens there");
    }

    #[test]
    fn too_many_are_refused() {
        let wish = PortWish { purpose: Purpose::Http, count: 12_001 };
        let error = choose(&[wish], &Ports::new(), &[], 1).expect_err("too many").to_string();
        assert_eq!(error, "no 12001 free ports in a row within 20000..32000");
    }
}
