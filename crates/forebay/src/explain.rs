//! `forebay explain`: why a request ran where it ran.
//!
//! In: a [`DecisionRecord`] from the admin address. Out: text for people. Start at [`run`].

mod view;

use forebay_gateway::decisions::DecisionRecord;
use serde_json::value::RawValue;

use crate::{
    cli::ExplainArgs,
    client::{Client, ClientError},
    exit::{Exit, Failed},
    terminal::{Paint, Terminal},
};

/// Where decisions are described.
const DECISIONS_PATH: &str = "/fleet/v1/decisions";

/// Explains one request.
///
/// # Errors
/// No server, or no such request.
pub(crate) async fn run(args: &ExplainArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let client = Client::new(&args.admin_url, None)?;
    let record = match &args.id {
        Some(id) => one(&client, id).await?,
        None => newest(&client).await?,
    };
    if args.json {
        terminal.out(&format!("{}\n", record.get()))?;
        return Ok(Exit::Ok);
    }
    let record = read(&client, &record)?;
    let detail = if args.inputs { view::Detail::WithInputs } else { view::Detail::Brief };
    terminal.out(&view::render(&record, detail, terminal.width(), terminal.paint_out))?;
    Ok(Exit::Ok)
}

/// The explanation of one request, for whoever has its id: `/explain` in a chat.
///
/// # Errors
/// As [`run`].
pub(crate) async fn text(
    client: &Client,
    id: &str,
    width: Option<usize>,
    paint: Paint,
) -> anyhow::Result<String> {
    let record = one(client, id).await?;
    Ok(view::render(&read(client, &record)?, view::Detail::Brief, width, paint))
}

async fn one(client: &Client, id: &str) -> anyhow::Result<Box<RawValue>> {
    match client.get_json(&format!("{DECISIONS_PATH}/{}", percent_encoded(id))).await {
        Err(ClientError::Refused { status: 404, .. }) => Err(Failed {
            exit: Exit::NotFound,
            sentence: format!(
                "{} knows no request `{id}`: it never came there, or newer ones took its place \
                 (`decisions_max` says how many are kept)",
                client.authority()
            ),
        }
        .into()),
        other => Ok(other?),
    }
}

async fn newest(client: &Client) -> anyhow::Result<Box<RawValue>> {
    let records: Vec<Box<RawValue>> = client.get_list(&format!("{DECISIONS_PATH}?limit=1")).await?;
    records.into_iter().next().ok_or_else(|| {
        let sentence = format!("{} has decided nothing yet; send a request first", client.authority());
        Failed { exit: Exit::NotFound, sentence }.into()
    })
}

fn read(client: &Client, record: &RawValue) -> Result<DecisionRecord, ClientError> {
    let record: DecisionRecord = serde_json::from_str(record.get()).map_err(|cause| client.strange(cause))?;
    let is_sound = |explanation: &forebay_placement::Explanation| {
        (explanation.chosen as usize) < explanation.candidates.len()
    };
    if record.placements.iter().all(|placement| is_sound(&placement.explanation)) {
        Ok(record)
    } else {
        Err(client.strange("a placement without the candidate that it chose"))
    }
}

/// An id as one segment of a path.
fn percent_encoded(id: &str) -> String {
    id.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::percent_encoded;

    #[test]
    fn an_id_stays_one_segment() {
        assert_eq!(percent_encoded("req-7.a_b~"), "req-7.a_b~");
        assert_eq!(percent_encoded("../é ?"), "..%2F%C3%A9%20%3F");
    }
}

/// Records as a server sends them.
#[cfg(test)]
pub(crate) mod sample {
    use forebay_gateway::decisions::DecisionRecord;

    pub(crate) fn split() -> DecisionRecord {
        read(include_str!("../tests/fixtures/decision-split.json"))
    }

    pub(crate) fn failed() -> DecisionRecord {
        read(include_str!("../tests/fixtures/decision-failed.json"))
    }

    fn read(text: &str) -> DecisionRecord {
        serde_json::from_str(text).expect("a record as the gateway writes it")
    }
}
