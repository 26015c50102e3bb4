//! What was inferred, as sessions for the twin; what is not known is drawn from a seed.
//!
//! A session's key is the number of the seat where it was seen, so that `Rule::Pinned` sends it there. Prompts are made of
//! pieces, each with a name: what two requests share has the same names, answers that later prompts repeat included.

use std::collections::{HashMap, HashSet};

use forebay_twin::{Draw, Piece, Session, Time, TraceRequest, Turn, mix};

use crate::{
    chains::{Origin, Seen},
    infer::{Inferred, Solved, counts},
    meter::Interval,
};

/// By how much lengths and delays that are only known in the mean are taken to vary: uniformly, by up to this share.
const SPREAD: f64 = 0.5;
/// A request that nobody saw repeats one of so many before it.
const RECENT: usize = 64;
/// Bits of an id in a trace: what every reader of JSON keeps exactly.
const ID_BITS: u32 = 52;

/// Kinds of pieces.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Own = 1,
    Tail,
    Answer,
    Root,
    Common,
    MadeUp,
    MadeUpAnswer,
}

fn name(kind: Kind, number: u64) -> u64 {
    mix(mix(0xa0d1_7000 + kind as u64) ^ number)
}

impl Inferred {
    /// What arrived, in order of time. Seeds differ in what is not known: moments of arrival, ends of prompts, requests that
    /// only counters show, and, where nothing shows it, whether ranks that went on from unknown beginnings had the same ones:
    /// with odd seeds the most frequent of each rank are one.
    pub fn sessions(&self, seed: u64) -> Vec<Session> {
        let mut draw = Draw::new(seed, "audit");
        let tails = self.seen.iter().map(|request| {
            let tokens = self.seats[usize::from(request.seat)].tail_tokens;
            (tokens * 2.0 * draw.unit()).round() as u32
        });
        let maker = Maker { of: self, tails: tails.collect(), roots: self.root_names(seed) };
        let mut sessions = Vec::new();
        for (number, request) in self.seen.iter().enumerate() {
            let (seat, sum) = (&self.seats[usize::from(request.seat)], &self.sums[usize::from(request.seat)]);
            if counts(request, sum) {
                let back = seat.ttft_seconds * varied(&mut draw);
                let output = f64::from(request.grown_tokens) + seat.output_tokens;
                let prompt = maker.prompt(number);
                let answer =
                    Piece { name: name(Kind::Answer, number as u64), tokens: output.round().max(1.0) as u32 };
                sessions.push(session(request.at_seconds - back, request.seat.into(), prompt, answer));
            }
        }
        for (seat, solved) in self.seats.iter().enumerate() {
            if solved.is_blind {
                self.blind(seat, solved, &mut draw, &mut sessions);
            } else {
                self.unseen(seat, solved, &maker, &mut draw, &mut sessions);
            }
        }
        sessions.sort_by_key(|session| session.at);
        sessions
    }

    fn root_names(&self, seed: u64) -> Vec<u64> {
        let mut names: Vec<u64> = self.roots.iter().map(|&root| name(Kind::Root, root)).collect();
        let mut uses: HashMap<(u16, u32), usize> = HashMap::new();
        for request in &self.seen {
            if let Some(root) = request.root {
                *uses.entry((request.seat, root)).or_default() += 1;
            }
        }
        let distinct: HashSet<u32> = uses.keys().map(|(_, root)| *root).collect();
        // Where ranks are known to have the same ones, those that are not are others.
        if seed.is_multiple_of(2) || distinct.len() < uses.len() {
            return names;
        }
        let mut uses: Vec<_> = uses.into_iter().collect();
        uses.sort_by_key(|&((seat, root), times)| (seat, std::cmp::Reverse(times), root));
        for of_seat in uses.chunk_by(|one, other| one.0.0 == other.0.0) {
            for (rank, &((_, root), _)) in of_seat.iter().enumerate() {
                names[root as usize] = name(Kind::Root, rank as u64);
            }
        }
        names
    }

    /// Requests that left counters alone: they repeat prompts of late, for what is all cached stores nothing.
    fn unseen(
        &self,
        seat: usize,
        solved: &Solved,
        maker: &Maker<'_>,
        draw: &mut Draw,
        sessions: &mut Vec<Session>,
    ) {
        let of_seat: Vec<usize> =
            (0..self.seen.len()).filter(|&number| usize::from(self.seen[number].seat) == seat).collect();
        let moments = Moments::of(&self.intervals[seat]);
        for nth in 0..solved.unseen {
            let at = moments.draw(draw);
            let number = (seat as u64) << 32 | nth as u64;
            let wanted = (solved.unseen_prompt_tokens * varied(draw)).round().max(1.0) as u32;
            let before = of_seat.partition_point(|&number| self.seen[number].at_seconds < at);
            let recent = &of_seat[before.saturating_sub(RECENT)..before];
            let mut prompt = Vec::new();
            if !recent.is_empty() {
                prompt = maker.prompt(recent[draw.below(recent.len() as u64) as usize]);
            }
            cut(&mut prompt, wanted.saturating_sub(1));
            let rest = wanted - prompt.iter().map(|piece| piece.tokens).sum::<u32>();
            prompt
                .push(Piece { name: name(Kind::MadeUp, number), tokens: rest.min(self.block_tokens).max(1) });
            let output = (solved.unseen_output_tokens * varied(draw)).round().max(1.0) as u32;
            let answer = Piece { name: name(Kind::MadeUpAnswer, number), tokens: output };
            sessions.push(session(at - solved.ttft_seconds * varied(draw), seat as u64, prompt, answer));
        }
    }

    /// Requests of a rank that nothing but counters tells of. They share the measured share of their prompts with all others.
    fn blind(&self, seat: usize, solved: &Solved, draw: &mut Draw, sessions: &mut Vec<Session>) {
        let (sum, moments) = (&self.sums[seat], Moments::of(&self.intervals[seat]));
        let count = solved.unseen;
        let mut made: Vec<(f64, f64, f64)> = Vec::with_capacity(count);
        for _ in 0..count {
            let (at, interval) = moments.draw_in(draw);
            let of_interval =
                if interval.begun > 0.0 { interval.prompt_tokens / interval.begun } else { 0.0 };
            let prompt = sum.histograms.prompts.quantile(draw.unit()).unwrap_or(of_interval * varied(draw));
            let typical = solved.unseen_output_tokens * varied(draw);
            let output = sum.histograms.answers.quantile(draw.unit()).unwrap_or(typical);
            made.push((at, prompt, output));
        }
        let scale = |sum: f64, of: fn(&(f64, f64, f64)) -> f64| {
            let all: f64 = made.iter().map(of).sum();
            if all > 0.0 { sum / all } else { 1.0 }
        };
        let prompts = scale(sum.prompt_tokens, |made| made.1);
        let outputs = scale(sum.output_tokens, |made| made.2);
        for (nth, &(at, prompt, output)) in made.iter().enumerate() {
            let number = (seat as u64) << 32 | nth as u64;
            let tokens = (prompt * prompts).round().max(1.0) as u32;
            let blocks = f64::from(tokens) * solved.cached_share / f64::from(self.block_tokens);
            let common = (blocks.round() as u32 * self.block_tokens).min(tokens - 1);
            let pieces = vec![
                Piece { name: name(Kind::Common, 0), tokens: common },
                Piece { name: name(Kind::MadeUp, number), tokens: tokens - common },
            ];
            let answer = Piece {
                name: name(Kind::MadeUpAnswer, number),
                tokens: (output * outputs).round().max(1.0) as u32,
            };
            sessions.push(session(at - solved.ttft_seconds * varied(draw), seat as u64, pieces, answer));
        }
    }
}

/// Around 1.
fn varied(draw: &mut Draw) -> f64 {
    1.0 - SPREAD + 2.0 * SPREAD * draw.unit()
}

/// The first `tokens` of a prompt.
fn cut(prompt: &mut Vec<Piece>, tokens: u32) {
    let mut left = tokens;
    for piece in prompt.iter_mut() {
        piece.tokens = piece.tokens.min(left);
        left -= piece.tokens;
    }
    prompt.retain(|piece| piece.tokens > 0);
}

fn session(at_seconds: f64, seat: u64, mut new: Vec<Piece>, answer: Piece) -> Session {
    new.retain(|piece| piece.tokens > 0);
    let turn = Turn { new, answer, think: Time::ZERO };
    Session { at: Time::from_seconds(at_seconds.max(0.0)), key: seat, tenant: 0, turns: vec![turn] }
}

/// When requests came, by the counters.
struct Moments<'a> {
    intervals: &'a [Interval],
    /// Requests up to the end of each.
    sums: Vec<f64>,
}

impl<'a> Moments<'a> {
    fn of(intervals: &'a [Interval]) -> Self {
        let sums = intervals.iter().scan(0.0, |sum, interval| {
            *sum += interval.begun;
            Some(*sum)
        });
        Self { intervals, sums: sums.collect() }
    }

    fn draw(&self, draw: &mut Draw) -> f64 {
        self.draw_in(draw).0
    }

    /// There is at least one request.
    fn draw_in(&self, draw: &mut Draw) -> (f64, &'a Interval) {
        let all = self.sums.last().copied().unwrap_or(0.0);
        let wanted = draw.unit() * all;
        let nth = self.sums.partition_point(|&sum| sum < wanted).min(self.sums.len() - 1);
        let interval = &self.intervals[nth];
        let seconds = interval.to_seconds - interval.from_seconds;
        (interval.from_seconds + draw.unit() * seconds, interval)
    }
}

/// Makes prompts of requests that events show.
struct Maker<'a> {
    of: &'a Inferred,
    /// Tokens behind the last full block of each request's prompt.
    tails: Vec<u32>,
    roots: Vec<u64>,
}

impl Maker<'_> {
    /// A request's whole prompt; at least one token.
    fn prompt(&self, number: usize) -> Vec<Piece> {
        let mut pieces = self.beginning(number, self.of.seen[number].prompt_tokens());
        let tail = self.tails[number].max(u32::from(pieces.is_empty()));
        pieces.push(Piece { name: name(Kind::Tail, number as u64), tokens: tail });
        pieces
    }

    /// The first tokens of a request's sequence, counted behind its root, and that root.
    fn beginning(&self, number: usize, tokens: u32) -> Vec<Piece> {
        let seen = &self.of.seen;
        let mut path = vec![(number, tokens)];
        let mut first = &seen[number];
        let mut left = tokens;
        while let Origin::Request(earlier) = first.origin {
            left = left.min(first.shared_tokens);
            path.push((earlier as usize, left));
            first = &seen[earlier as usize];
        }
        let mut pieces = Vec::new();
        if let Origin::Root(root) = first.origin {
            pieces.push(Piece { name: self.roots[root as usize], tokens: self.of.sight.root_tokens });
        }
        for (number, tokens) in path.into_iter().rev() {
            self.own(number, &seen[number], tokens, &mut pieces);
        }
        pieces.retain(|piece| piece.tokens > 0);
        pieces
    }

    /// What a request adds to what it shares, up to so many tokens of its sequence.
    fn own(&self, number: usize, request: &Seen, tokens: u32, pieces: &mut Vec<Piece>) {
        let mut left = tokens.saturating_sub(request.shared_tokens);
        let lengths =
            [(Kind::Own, request.own_tokens), (Kind::Tail, self.tails[number]), (Kind::Answer, u32::MAX)];
        for (kind, length) in lengths {
            let tokens = left.min(length);
            left -= tokens;
            pieces.push(Piece { name: name(kind, number as u64), tokens });
        }
    }
}

/// Sessions of one turn as requests of a trace. Ids are made of what pieces are called, so they tell nothing of any text.
pub fn trace(sessions: &[Session], block_tokens: u32) -> Vec<TraceRequest> {
    let requests = sessions.iter().map(|session| {
        let turn = &session.turns[0];
        let prompt_tokens: u32 = turn.new.iter().map(|piece| piece.tokens).sum();
        TraceRequest {
            at_seconds: session.at.seconds(),
            prompt_tokens,
            output_tokens: turn.answer.tokens,
            blocks: ids(&turn.new, block_tokens, prompt_tokens),
            block_tokens,
            tenant: 0,
            session: None,
            observed: None,
        }
    });
    requests.collect()
}

/// An id for each block, made of all up to its end.
fn ids(prompt: &[Piece], block_tokens: u32, prompt_tokens: u32) -> Vec<u64> {
    let mut ids = Vec::with_capacity(prompt_tokens.div_ceil(block_tokens) as usize);
    let (mut state, mut room) = (0, block_tokens);
    for piece in prompt {
        let mut from = 0;
        while from < piece.tokens {
            let taken = room.min(piece.tokens - from);
            state = mix(mix(mix(state ^ piece.name) ^ u64::from(from)) ^ u64::from(taken));
            from += taken;
            room -= taken;
            if room == 0 {
                ids.push(state >> (64 - ID_BITS));
                room = block_tokens;
            }
        }
    }
    if room < block_tokens {
        ids.push(state >> (64 - ID_BITS));
    }
    ids
}
