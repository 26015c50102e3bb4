//! What chat templates find beyond Jinja itself: Python's methods, `raise_exception`, `strftime_now`, JSON as Python
//! writes it, Transformers' white-space rules and its `generation` blocks.

use std::{borrow::Cow, error::Error as _, fmt};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value, syntax::SyntaxConfig, value::Kwargs,
};

use super::{UnixTime, bounds, json};

/// An environment with one template. `fuel` bounds each rendering.
pub(super) fn compile(name: &'static str, source: &str, fuel: u64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(bounds::method);
    environment.set_formatter(bounds::write);
    environment.set_fuel(Some(fuel));
    environment.set_debug(false);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", bounds::string);
    environment.add_filter("trim", bounds::trim);
    environment.add_function("raise_exception", raise_exception);
    environment.add_template_owned(name, without_generation_blocks(source).into_owned())?;
    Ok(environment)
}

/// `strftime_now(format)`, with the time fixed.
pub(super) fn strftime_now(now: UnixTime) -> Value {
    Value::from_function(move |format: &str| {
        now.format(format).map_err(|directive| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know %{directive}"))
        })
    })
}

/// The message of the `raise_exception` that caused `error`, also from within a macro.
pub(super) fn raised(error: &Error) -> Option<String> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(state: &State<'_, '_>, message: &Value) -> Result<Value, Error> {
    let message = bounds::text(state, message)?.into_owned();
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// What a byte of JSON costs: writing it takes so much longer than copying it.
const JSON_BYTE_COST: usize = 8;

/// `tojson` as Transformers defines it: `json.dumps` with `ensure_ascii=False`. Jinja's own escapes for HTML.
#[expect(clippy::needless_pass_by_value, reason = "filters take their keyword arguments by value")]
fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if ascii == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson cannot escape non-ASCII characters"));
    }
    let separators = match separators {
        None => None,
        Some(separators) => Some(
            <[String; 2]>::try_from(separators)
                .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson takes a pair of separators"))?,
        ),
    };
    let bytes_max = bounds::bytes_left(state) / JSON_BYTE_COST;
    let text = json::dump(value, indent, separators, bytes_max).map_err(|cause| match cause {
        json::DumpError::TooLong => bounds::exhausted(),
        json::DumpError::Other(cause) => Error::new(ErrorKind::BadSerialization, "tojson").with_source(cause),
    })?;
    bounds::charge(state, text.len() * (JSON_BYTE_COST - 1))?; // the engine charges the text itself
    Ok(Value::from(text))
}

/// Replaces the tags `generation` and `endgeneration`, by which Transformers finds the assistant's tokens in training,
/// by a condition that always holds, so that white space stays as it was.
fn without_generation_blocks(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let word = tag[2..end - 2].trim_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag[..end].replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag[..end].replace("endgeneration", "endif")),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}
