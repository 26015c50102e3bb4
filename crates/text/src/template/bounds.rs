//! Bounds of what minijinja's fuel leaves out: Python's methods, which are not its own, and the text of containers.
//!
//! The engine charges a filter or a method for its result once that exists. So whatever could make much of little asks here
//! first whether the fuel that is left can pay for it ([`afford`]).

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use minijinja::{
    Error, ErrorKind, Output, State, Value, escape_formatter, filters,
    value::{StringInput, ValueKind},
};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one fuel pays for.
const FUEL_BYTES: usize = 64;
/// Bytes of one item of a list.
const ITEM_BYTES: usize = 32;

/// What a byte of a container's text costs: writing that takes so much longer than copying, and the engine charges so.
const CONTAINER_BYTE_COST: usize = 16;

/// Bytes that this rendering may still make.
pub(super) fn bytes_left(state: &State<'_, '_>) -> usize {
    match state.fuel_levels() {
        Some((_, left)) => usize::try_from(left).unwrap_or(usize::MAX).saturating_mul(FUEL_BYTES),
        None => usize::MAX,
    }
}

/// The error of a rendering that may do no more.
pub(super) fn exhausted() -> Error {
    Error::from(ErrorKind::OutOfFuel)
}

/// Pays for work on so many bytes.
pub(super) fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / FUEL_BYTES) as u64)
}

/// Whether so many bytes could be paid for. Nothing is: the engine charges them when they are there.
fn afford(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    if bytes <= bytes_left(state) { Ok(()) } else { Err(exhausted()) }
}

/// A method that minijinja does not know: one of Python's.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match value.as_str() {
        Some(text) => before_text_method(state, text, name, arguments)?,
        None if name == "count" => state.consume_fuel(value.len().unwrap_or(0) as u64)?,
        None => {}
    }
    unknown_method_callback(state, value, name, arguments)
}

fn before_text_method(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    arguments: &[Value],
) -> Result<(), Error> {
    let argument = |index: usize| arguments.get(index).and_then(Value::as_str);
    match (name, argument(0)) {
        ("replace", Some(old)) => {
            let new = argument(1).unwrap_or_default();
            let most = arguments.get(2).and_then(Value::as_usize).unwrap_or(usize::MAX);
            afford_pieces(state, text, old, most, new.len())
        }
        ("split", Some(separator)) => afford_pieces(state, text, separator, usize::MAX, ITEM_BYTES),
        ("split", None) => afford_pieces(state, text, " ", usize::MAX, ITEM_BYTES),
        ("splitlines", _) => afford_pieces(state, text, "\n", usize::MAX, ITEM_BYTES),
        // Every character of the text may be compared with all of these.
        ("strip" | "lstrip" | "rstrip", Some(characters)) => charge_strip(state, text, characters),
        ("startswith" | "endswith", None) => match arguments.first() {
            Some(several) => several.try_iter()?.try_for_each(|_| state.consume_fuel(1)),
            None => Ok(()),
        },
        ("join", _) => afford_join(state, text, arguments),
        ("format", _) => afford_format(state, text, arguments),
        _ => Ok(()),
    }
}

/// Whether `bytes` for each piece of `text`, cut at `separator` at most so many times, could be paid for.
fn afford_pieces(
    state: &State<'_, '_>,
    text: &str,
    separator: &str,
    most: usize,
    bytes: usize,
) -> Result<(), Error> {
    let in_all = |pieces: usize| pieces.min(most).saturating_mul(bytes).saturating_add(text.len());
    // Counting takes as long as the work itself, so first without.
    let at_most = text.len() / separator.len().max(1) + 1;
    if in_all(at_most) <= bytes_left(state) {
        return Ok(());
    }
    afford(state, in_all(text.matches(separator).count() + 1))
}

fn charge_strip(state: &State<'_, '_>, text: &str, characters: &str) -> Result<(), Error> {
    // A handful of characters costs no more than the reading of the text, which the engine charges.
    charge(state, text.len().saturating_mul(characters.len() / 8))
}

fn afford_join(state: &State<'_, '_>, separator: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(values) = arguments.first() else { return Ok(()) };
    let mut bytes = 0_usize;
    for value in values.try_iter()? {
        state.consume_fuel(1)?;
        bytes = bytes.saturating_add(separator.len()).saturating_add(text_bytes(state, &value)?);
        afford(state, bytes)?;
    }
    Ok(())
}

/// Each number in a format may be a width, each brace the longest argument.
fn afford_format(state: &State<'_, '_>, format: &str, arguments: &[Value]) -> Result<(), Error> {
    let runs = format.split(|character: char| !character.is_ascii_digit()).filter(|run| !run.is_empty());
    let widths = runs.fold(0_usize, |sum, run| sum.saturating_add(run.parse().unwrap_or(usize::MAX)));
    let mut longest = 0;
    for argument in arguments {
        longest = longest.max(text_bytes(state, argument)?);
    }
    let fields = format.matches('{').count();
    afford(state, fields.saturating_mul(longest).saturating_add(widths).saturating_add(format.len()))
}

/// Of a number, a bool or none.
const SCALAR_BYTES: usize = 64;

/// Length of a value's text.
fn text_bytes(state: &State<'_, '_>, value: &Value) -> Result<usize, Error> {
    match (value.as_str(), value.as_object()) {
        (Some(text), _) => Ok(text.len()),
        (None, None) => Ok(SCALAR_BYTES),
        (None, Some(_)) => {
            let bytes_max = bytes_left(state) / CONTAINER_BYTE_COST;
            let mut measured = Bounded { inner: &mut Nowhere, left: bytes_max };
            write!(measured, "{value}").map_err(|_| exhausted())?;
            let bytes = bytes_max - measured.left;
            charge(state, bytes * CONTAINER_BYTE_COST)?;
            Ok(bytes)
        }
    }
}

/// A value's text, if that can be paid for: a list that holds another twice, and so on, has more text than there is memory.
pub(super) fn text<'a>(state: &State<'_, '_>, value: &'a Value) -> Result<Cow<'a, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(Cow::Borrowed(text));
    }
    let mut text = String::new();
    let mut bounded = Bounded { inner: &mut text, left: bytes_left(state) / CONTAINER_BYTE_COST };
    write!(bounded, "{value}").map_err(|_| exhausted())?;
    charge(state, text.len() * CONTAINER_BYTE_COST)?;
    Ok(Cow::Owned(text))
}

/// How `{{ value }}` is written.
pub(super) fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            let left = bytes_left(state) / CONTAINER_BYTE_COST;
            write!(Bounded { inner: out, left }, "{value}").map_err(|_| exhausted())
        }
        _ => escape_formatter(out, state, value),
    }
}

/// `value | string`
pub(super) fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value.clone());
    }
    text(state, value).map(Value::from)
}

/// `value | trim(characters)`
pub(super) fn trim(
    state: &State<'_, '_>,
    value: StringInput<'_>,
    characters: Option<Cow<'_, str>>,
) -> Result<Value, Error> {
    if let Some(characters) = &characters {
        charge_strip(state, value.as_str(), characters)?;
    }
    Ok(filters::trim(value, characters))
}

/// Fails to write what goes beyond its bound.
struct Bounded<'a, W> {
    inner: &'a mut W,
    left: usize,
}

impl<W: fmt::Write> fmt::Write for Bounded<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.left = self.left.checked_sub(text.len()).ok_or(fmt::Error)?;
        self.inner.write_str(text)
    }
}

struct Nowhere;

impl fmt::Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}
