//! Engines given by URL: from settings to launchers, and what `forebay doctor` asks them.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context as _;
use forebay_engines::remote::{
    AttachSettings, Dialect, KvSource, ObserveSettings, Overrides, RemoteContext, RemoteLauncher,
    RemoteLimits, RemoteSpec, TokenizerProbe,
    client::{ClientSettings, HttpClient, Secret, TlsSettings},
};
use forebay_gateway::{
    cluster::{Outbound, Tokenizers},
    http::{AttachedText, AttachedTexts},
};
use forebay_kv_hash::BlockHasher;
use forebay_proto::TokenizerFile;
use forebay_text::{Conversation, Message};
use forebay_types::TokenId;
use tokio::runtime::Handle;

use super::texts::text_of_attached;
use crate::settings::{Settings, attach_spec::AttachSpec};

/// What all attached engines share.
pub(crate) fn context(
    settings: &Settings,
    hasher: BlockHasher,
    outbound: &Outbound,
    runtime: &Handle,
) -> Arc<RemoteContext> {
    Arc::new(RemoteContext {
        client: outbound.http.clone(),
        hasher,
        attach: AttachSettings::default(),
        observe: ObserveSettings {
            silent_after: settings.cluster.silence_seconds_max,
            lease: settings.cluster.lease_seconds,
            ..ObserveSettings::default()
        },
        limits: RemoteLimits { kv_lease: settings.kv.kv_lease_seconds, ..RemoteLimits::default() },
        runtime: runtime.clone(),
        rooms: outbound.draw.clone(),
        held: outbound.held.clone(),
    })
}

/// Starts lives of the engine that a specification names.
///
/// # Errors
/// Its key or certificate cannot be read, or cannot be one.
pub(crate) fn launcher(
    spec: &AttachSpec,
    texts: &AttachedTexts,
    environment: &BTreeMap<String, String>,
    context: &Arc<RemoteContext>,
) -> anyhow::Result<RemoteLauncher> {
    let AttachSpec { kind, url, role, name: _, key_env, key_file, ca_file, events, replay, weight, labels } =
        spec;
    let remote = RemoteSpec {
        name: Some(spec.name().into()),
        dialect: kind.as_deref().and_then(Dialect::named),
        role: *role,
        key: key(key_env.as_deref(), key_file.as_deref(), environment)?,
        labels: labels.clone(),
        weight: *weight,
        overrides: Overrides {
            kv_events: events.as_ref().map(|endpoint| KvSource {
                dp_rank: 0,
                events: endpoint.clone(),
                replay: replay.clone(),
                topic: String::new(),
            }),
            ..Overrides::default()
        },
        tokenizer: probe(texts),
        client: ca_file.as_deref().map(client).transpose()?,
        ..RemoteSpec::new(url.clone())
    };
    RemoteLauncher::new(remote, context.clone()).with_context(|| format!("engine {}", spec.name()))
}

/// An engine's API key, from a variable or a file.
///
/// # Errors
/// There is none where it should be.
pub(crate) fn key(
    variable: Option<&str>,
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
) -> anyhow::Result<Option<Secret>> {
    let text = match (variable, file) {
        (Some(name), _) => {
            let value = environment.get(name).filter(|value| !value.is_empty());
            value
                .with_context(|| {
                    format!("the variable {name}, which should hold an engine's key, is not set")
                })?
                .clone()
        }
        (None, Some(path)) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the engine's key {}", path.display()))?,
        (None, None) => return Ok(None),
    };
    Ok(Some(Secret::new(text.trim())))
}

/// Connections to engines whose certificates another authority signed.
///
/// # Errors
/// The file is not there, or holds no certificate.
pub(crate) fn client(ca: &Path) -> anyhow::Result<Arc<HttpClient>> {
    let pem = std::fs::read_to_string(ca).with_context(|| format!("cannot read {}", ca.display()))?;
    let tls = TlsSettings { extra_ca: Some(pem.into()), ..TlsSettings::default() };
    HttpClient::new(&ClientSettings { tls, ..ClientSettings::default() })
        .with_context(|| format!("the certificate {}", ca.display()))
}

/// The tokenizers of models, for engines that agents bring: from the settings, else from the agents.
pub(super) struct SharedTexts(pub(super) AttachedTexts);

impl Tokenizers for SharedTexts {
    fn of(&self, model: &str) -> Option<Arc<dyn TokenizerProbe>> {
        self.0.of(model).map(|text| Arc::new(Probe(text)) as Arc<dyn TokenizerProbe>)
    }

    fn learn(&self, model: &str, files: &[TokenizerFile]) -> Result<(), String> {
        if self.0.of(model).is_some() {
            return Ok(());
        }
        let loaded = || -> anyhow::Result<AttachedText> {
            let folder = tempfile::tempdir().context("cannot make a folder for its files")?;
            for TokenizerFile { name, bytes } in files {
                std::fs::write(folder.path().join(name), bytes).context("cannot keep its files")?;
            }
            text_of_attached(Some(model), folder.path())
        };
        let text = loaded().map_err(|error| format!("{error:#}"))?;
        self.0.add(text)?;
        tracing::info!(model, "tokenizer taken from an agent");
        Ok(())
    }
}

/// The tokenizer that is compared with the engine's. Which model it is for shows only when the engine answers, so it is the
/// one for any model, or the only one.
fn probe(texts: &AttachedTexts) -> Option<Arc<dyn TokenizerProbe>> {
    Some(Arc::new(Probe(texts.of_any()?)))
}

struct Probe(AttachedText);

impl TokenizerProbe for Probe {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        let mut tokens = Vec::new();
        self.0.tokenizer.encode_completion(text, &mut tokens).map_err(|error| error.to_string())?;
        Ok(tokens)
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        let json: Vec<_> = messages
            .iter()
            .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
            .collect();
        let json = serde_json::Value::from(json).to_string();
        let messages: Vec<Message<'_>> = serde_json::from_str(&json).map_err(|error| error.to_string())?;
        let conversation = Conversation {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            extra: None,
            now: None,
        };
        let text = self.0.template.render(&conversation).map_err(|error| error.to_string())?;
        let mut tokens = Vec::new();
        self.0.tokenizer.encode(&text, &mut tokens).map_err(|error| error.to_string())?;
        Ok(tokens)
    }
}
