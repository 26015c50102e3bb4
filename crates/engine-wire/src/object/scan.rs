//! One pass over JSON text: is it JSON, is it fit to be parsed by others, and where do values end.
//!
//! Stacks and strings of a parser are not needed for that: which brackets are open are the bits of one number, and the
//! inside of a string is searched for its end sixteen bytes and more at a time.

use std::ops::Range;

use memchr::memchr2;

use super::{DEPTH_MAX, Flaw, Place};

/// Where a scan is.
pub(super) struct Scan<'a> {
    json: &'a [u8],
    at: usize,
}

/// The brackets that are open within a value: from the innermost on, a bit each, set for objects.
#[derive(Default)]
struct Open {
    objects: u128,
    depth: u32,
}

impl Open {
    fn push(&mut self, is_object: bool) -> bool {
        self.objects = self.objects << 1 | u128::from(is_object);
        self.depth += 1;
        self.depth < DEPTH_MAX
    }

    fn pop(&mut self) {
        self.objects >>= 1;
        self.depth -= 1;
    }

    /// `None`: no bracket is open.
    fn is_object(&self) -> Option<bool> {
        (self.depth > 0).then_some(self.objects & 1 == 1)
    }
}

impl<'a> Scan<'a> {
    pub(super) fn new(json: &'a [u8]) -> Self {
        Self { json, at: 0 }
    }

    /// The next byte that is no white space, which is not passed.
    pub(super) fn peek(&mut self) -> Option<u8> {
        while let Some(&byte) = self.json.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Passes white space and `byte`, if that is what comes.
    pub(super) fn take(&mut self, byte: u8) -> bool {
        let comes = self.peek() == Some(byte);
        self.at += usize::from(comes);
        comes
    }

    pub(super) fn expected(&mut self, what: &'static str) -> Flaw {
        self.peek();
        Flaw::Syntax { expected: what, place: self.place(self.at) }
    }

    pub(super) fn place(&self, at: usize) -> Place {
        Place::of(self.json, at)
    }

    /// Passes a key and its colon; the key with its quotation marks.
    pub(super) fn key(&mut self) -> Result<Range<usize>, Flaw> {
        if self.peek() != Some(b'"') {
            return Err(self.expected("a key in quotation marks"));
        }
        let start = self.at;
        self.string()?;
        let key = start..self.at;
        if self.take(b':') { Ok(key) } else { Err(self.expected("`:`")) }
    }

    /// Passes a value.
    pub(super) fn value(&mut self) -> Result<Range<usize>, Flaw> {
        let mut open = Open::default();
        self.peek();
        let start = self.at;
        loop {
            let opens = match self.peek() {
                Some(b'{') => Some(true),
                Some(b'[') => Some(false),
                _ => None,
            };
            match opens {
                None => self.scalar()?,
                Some(is_object) => {
                    // The object around it is a level, too.
                    if !open.push(is_object) {
                        return Err(Flaw::Deep { place: self.place(self.at) });
                    }
                    self.at += 1;
                    if !self.take(if is_object { b'}' } else { b']' }) {
                        if is_object {
                            self.key()?;
                        }
                        continue;
                    }
                    open.pop();
                }
            }
            if !self.goes_on(&mut open)? {
                return Ok(start..self.at);
            }
        }
    }

    /// Passes what closes behind a value; whether another value comes.
    fn goes_on(&mut self, open: &mut Open) -> Result<bool, Flaw> {
        while let Some(is_object) = open.is_object() {
            if self.take(b',') {
                if is_object {
                    self.key()?;
                }
                return Ok(true);
            }
            let (closing, what) = if is_object { (b'}', "`,` or `}`") } else { (b']', "`,` or `]`") };
            if !self.take(closing) {
                return Err(self.expected(what));
            }
            open.pop();
        }
        Ok(false)
    }

    fn scalar(&mut self) -> Result<(), Flaw> {
        match self.json.get(self.at) {
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.word(b"true"),
            Some(b'f') => self.word(b"false"),
            Some(b'n') => self.word(b"null"),
            _ => Err(self.expected("a value")),
        }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), Flaw> {
        if !self.json[self.at..].starts_with(word) {
            return Err(self.expected("a value"));
        }
        self.at += word.len();
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Flaw> {
        let rest = &self.json[self.at..];
        let digits = rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
        self.at += digits;
        if digits > 0 { Ok(()) } else { Err(self.expected("a digit")) }
    }

    /// Passes one of some bytes, without white space before it.
    fn one_of(&mut self, bytes: &[u8]) -> bool {
        let comes = self.json.get(self.at).is_some_and(|byte| bytes.contains(byte));
        self.at += usize::from(comes);
        comes
    }

    fn number(&mut self) -> Result<(), Flaw> {
        self.one_of(b"-");
        if !self.one_of(b"0") {
            self.digits()?;
        }
        if self.one_of(b".") {
            self.digits()?;
        }
        if self.one_of(b"eE") {
            self.one_of(b"+-");
            self.digits()?;
        }
        Ok(())
    }

    /// Passes a string, whose quotation mark comes.
    fn string(&mut self) -> Result<(), Flaw> {
        self.at += 1;
        loop {
            let rest = &self.json[self.at..];
            let Some(plain) = memchr2(b'"', b'\\', rest) else {
                self.at = self.json.len();
                return Err(self.expected("the end of a string"));
            };
            // No early exit, so that the loop takes many bytes at once.
            if rest[..plain].iter().fold(u8::MAX, |least, byte| least.min(*byte)) < 0x20 {
                let at = self.at + rest.iter().position(|byte| *byte < 0x20).unwrap_or(plain);
                let expected = "no control character in a string, but an escape";
                return Err(Flaw::Syntax { expected, place: self.place(at) });
            }
            self.at += plain;
            if rest[plain] == b'"' {
                self.at += 1;
                return Ok(());
            }
            self.escape()?;
        }
    }

    fn escape(&mut self) -> Result<(), Flaw> {
        match self.json.get(self.at + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 2,
            Some(b'u') => match (self.unit(self.at), self.unit(self.at + 6)) {
                (None, _) => return Err(self.expected("four digits of an escape")),
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => self.at += 12,
                (Some(unit @ 0xd800..=0xdfff), _) => {
                    return Err(Flaw::Surrogate { unit, place: self.place(self.at) });
                }
                (Some(_), _) => self.at += 6,
            },
            _ => return Err(self.expected("an escape that JSON has")),
        }
        Ok(())
    }

    /// The UTF-16 code unit that is escaped at `at`, if one is.
    fn unit(&self, at: usize) -> Option<u16> {
        let hex = self.json.get(at..at + 6)?.strip_prefix(b"\\u")?;
        hex.iter().try_fold(0, |unit, digit| Some(unit << 4 | char::from(*digit).to_digit(16)? as u16))
    }
}
