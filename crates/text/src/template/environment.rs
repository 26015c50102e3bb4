//! What chat templates find beyond Jinja itself: Python's methods, `raise_exception`, `strftime_now`, JSON as Python
//! writes it, Transformers' white-space rules and its `generation` blocks.

use std::{borrow::Cow, error::Error as _, fmt};

use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};

use super::{UnixTime, json};

/// An environment with one template. `fuel` bounds each rendering.
pub(super) fn compile(name: &'static str, source: &str, fuel: u64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(fuel));
    environment.set_debug(false);
    environment.add_filter("tojson", to_json);
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

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// `tojson` as Transformers defines it: `json.dumps` with `ensure_ascii=False`. Jinja's own escapes for HTML.
#[expect(clippy::needless_pass_by_value, reason = "filters take their keyword arguments by value")]
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
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
    let text = json::dump(value, indent, separators)
        .map_err(|cause| Error::new(ErrorKind::BadSerialization, "tojson").with_source(cause))?;
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
