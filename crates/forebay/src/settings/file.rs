//! The file layer: flat TOML, keys are setting names.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use toml::de::{DeTable, DeValue};

use super::{
    declare::{CONFIG, Setting},
    layers::{Given, Origin},
    nearest::nearest,
    problem::Problem,
    value::Form,
};

/// What the file at `path` says. Every mistake in it is reported, with its line.
pub(crate) fn read(
    path: &Path,
    known: &HashMap<&'static str, &'static Setting>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<&'static str, Given> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text, path, known, problems),
        Err(error) => {
            problems.push(Problem::Unreadable { path: path.to_owned(), reason: error.to_string() });
            BTreeMap::new()
        }
    }
}

/// As [`read`], of a text.
pub(crate) fn parse(
    text: &str,
    path: &Path,
    known: &HashMap<&'static str, &'static Setting>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<&'static str, Given> {
    let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
    let table = match DeTable::parse(text) {
        Ok(table) => table,
        Err(error) => {
            let line = error.span().map_or(1, |span| line_of(span.start));
            problems.push(Problem::Syntax {
                path: path.to_owned(),
                line,
                reason: error.message().to_owned(),
            });
            return BTreeMap::new();
        }
    };
    let mut given = BTreeMap::new();
    for (key, value) in table.get_ref() {
        let line = line_of(key.span().start);
        let name: &str = key.get_ref();
        if value.get_ref().is_table() {
            problems.push(Problem::Section { path: path.to_owned(), line, key: name.to_owned() });
            continue;
        }
        let Some(setting) = known.get(name) else {
            let nearest = nearest(name, sorted(known)).map(ToOwned::to_owned);
            problems.push(Problem::UnknownKey { path: path.to_owned(), line, key: name.to_owned(), nearest });
            continue;
        };
        if setting.name == CONFIG.name {
            problems.push(Problem::NotInFile { path: path.to_owned(), line, key: name.to_owned() });
            continue;
        }
        let origin = Origin::File { path: path.to_owned(), line };
        match texts(value.get_ref(), setting.form) {
            Some(texts) => {
                given.insert(setting.name, Given { texts, origin });
            }
            None => problems.push(Problem::Wrong {
                name: setting.name,
                value: if setting.secret { "(hidden)".to_owned() } else { text[value.span()].to_owned() },
                expected: setting.expected,
                origin,
                detail: format!("in a file {}", written(setting.form)),
            }),
        }
    }
    given
}

fn sorted(known: &HashMap<&'static str, &'static Setting>) -> Vec<&'static str> {
    let mut names: Vec<_> = known.keys().copied().filter(|name| *name != CONFIG.name).collect();
    names.sort_unstable();
    names
}

/// The text form of a TOML value, if its type is one that `form` takes.
fn texts(value: &DeValue<'_>, form: Form) -> Option<Vec<String>> {
    match (form, value) {
        (Form::Text | Form::Quantity, DeValue::String(text)) => Some(vec![text.to_string()]),
        (Form::Integer | Form::Number | Form::Quantity, DeValue::Integer(number)) if number.radix() == 10 => {
            Some(vec![number.as_str().to_owned()])
        }
        (Form::Number | Form::Quantity, DeValue::Float(number)) => Some(vec![number.as_str().to_owned()]),
        (Form::Switch, DeValue::Boolean(on)) => Some(vec![on.to_string()]),
        (Form::List, DeValue::Array(items)) => {
            items.iter().map(|item| item.get_ref().as_str().map(ToOwned::to_owned)).collect()
        }
        (Form::Engines, DeValue::Array(items)) => {
            items.iter().map(|item| engine_text(item.get_ref())).collect()
        }
        (Form::List | Form::Engines, DeValue::String(text)) => Some(vec![text.to_string()]),
        _ => None,
    }
}

/// One engine of a file: its text, or a table of the same options.
fn engine_text(value: &DeValue<'_>) -> Option<String> {
    let table = match value {
        DeValue::String(text) => return Some(text.to_string()),
        DeValue::Table(table) => table,
        _ => return None,
    };
    let scalar = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        _ => None,
    };
    let field =
        |name: &str| table.iter().find(|(key, _)| *key.get_ref() == name).map(|(_, value)| value.get_ref());
    let url = scalar(field("url")?)?;
    let mut text = match field("kind") {
        Some(kind) => format!("{}={url}", scalar(kind)?),
        None => url,
    };
    for (key, value) in table.iter() {
        let key: &str = key.get_ref();
        match value.get_ref() {
            _ if matches!(key, "url" | "kind") => {}
            DeValue::Table(labels) if key == "labels" => {
                for (label, value) in labels.iter() {
                    text += &format!(",label={}:{}", label.get_ref(), scalar(value.get_ref())?);
                }
            }
            value => text += &format!(",{}={}", key.replace('_', "-"), scalar(value)?),
        }
    }
    // Specifications are separated by spaces where they come as one text.
    (!text.contains(char::is_whitespace)).then_some(text)
}

/// How a form is written in TOML.
fn written(form: Form) -> &'static str {
    match form {
        Form::Text => "that is a string in quotes",
        Form::Integer => "that is a number without quotes",
        Form::Number => "that is a number without quotes",
        Form::Switch => "that is true or false without quotes",
        Form::Quantity => "that is a string in quotes or a number",
        Form::List => "that is an array of strings",
        Form::Engines => "that is an array of strings, or tables [[engine]] with `url` and options",
    }
}
