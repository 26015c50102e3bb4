//! `forebay-bpe`, with what a bare prompt is given before and after it.

use forebay_bpe::{Added, Cuts, Encoder, Unsupported};
use forebay_types::TokenId;
use serde_json::Value;

use super::Mode;

pub(super) struct Fast {
    encoder: Encoder,
    /// The tokens that completion adds.
    before: Vec<TokenId>,
    after: Vec<TokenId>,
}

/// Why there is no fast encoder for a tokenizer.
#[derive(Debug, thiserror::Error)]
pub(super) enum FastError {
    #[error(transparent)]
    Encoder(#[from] Unsupported),
    #[error("not supported: the post-processor {kind}")]
    PostProcessor { kind: String },
}

impl Fast {
    pub(super) fn load(json: &Value) -> Result<Self, FastError> {
        let mut fast = Self { encoder: Encoder::from_json(json)?, before: Vec::new(), after: Vec::new() };
        let steps = match &json["post_processor"] {
            Value::Null => &[],
            sequence if sequence["type"] == "Sequence" => {
                sequence["processors"].as_array().map(Vec::as_slice).unwrap_or_default()
            }
            one => std::slice::from_ref(one),
        };
        // It changes offsets, no tokens.
        let mut steps = steps.iter().filter(|step| step["type"] != "ByteLevel");
        if let Some(step) = steps.next() {
            let known = step["type"] == "TemplateProcessing" && fast.surround(step).is_some();
            if !known || steps.next().is_some() {
                let kind = json["post_processor"]["type"].as_str().unwrap_or_default().to_owned();
                return Err(FastError::PostProcessor { kind });
            }
        }
        Ok(fast)
    }

    /// Reads the template for one text; `None` if it is not a text between tokens.
    fn surround(&mut self, template: &Value) -> Option<()> {
        let mut texts = 0;
        for piece in template["single"].as_array()? {
            if piece["Sequence"]["id"] == "A" {
                texts += 1;
                continue;
            }
            let name = piece["SpecialToken"]["id"].as_str()?;
            let side = if texts == 0 { &mut self.before } else { &mut self.after };
            for id in template["special_tokens"][name]["ids"].as_array()? {
                side.push(TokenId::try_from(id.as_u64()?).ok()?);
            }
        }
        (texts == 1).then_some(())
    }

    /// See [`Encoder::cuts`].
    pub(super) fn cuts<'a>(&'a self, text: &'a str) -> Cuts<'a> {
        self.encoder.cuts(text)
    }

    /// What completion adds before a text and after it.
    pub(super) fn surroundings(&self) -> (&[TokenId], &[TokenId]) {
        (&self.before, &self.after)
    }

    pub(super) fn encode(&self, mode: Mode, text: &str, out: &mut Vec<TokenId>) {
        match mode {
            Mode::Plain => self.encoder.encode(Added::Ignored, text, out),
            Mode::Chat => self.encoder.encode(Added::Recognised, text, out),
            Mode::Completion => {
                out.extend_from_slice(&self.before);
                self.encoder.encode(Added::Recognised, text, out);
                out.extend_from_slice(&self.after);
            }
        }
    }
}
