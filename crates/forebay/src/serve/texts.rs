//! Finds and loads models and tokenizers.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::{Context as _, anyhow, bail};
use forebay_engines::embedded::{GgufMetadata, GgufTokenizer, Weights};
use forebay_gateway::http::{AttachedText, ModelText};
use forebay_text::{ChatTemplate, GgufVocabulary, Tokenizer};

use crate::settings::{Settings, choices::ModelChoice, model_path::ModelPath};

/// File of the default model in the model folder.
const SMOLLM2_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Weights of `random-tiny` are the same everywhere, so that its tokens are.
const RANDOM_TINY_SEED: u64 = 1;

/// Weights and the id that requests name.
pub(super) struct LoadedModel {
    pub(super) id: Arc<str>,
    pub(super) weights: Arc<Weights>,
}

pub(super) fn load_model(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
) -> anyhow::Result<LoadedModel> {
    let engines = &settings.engines;
    let (id, path) = match &engines.model {
        ModelChoice::RandomTiny => {
            return Ok(LoadedModel {
                id: "random-tiny".into(),
                weights: Weights::random_tiny(RANDOM_TINY_SEED),
            });
        }
        ModelChoice::Smollm2 => {
            let folder = settings.model_folder(environment);
            let folder = folder
                .ok_or_else(|| anyhow!("neither XDG_CACHE_HOME nor HOME is set: give `--model-folder`"))?;
            let path = folder.join(SMOLLM2_FILE);
            if !path.exists() {
                bail!(
                    "there is no model at {}: run `scripts/fetch-model.sh` in a checkout (`make model`), or give \
                     `--model PATH` or `--model random-tiny`",
                    path.display()
                );
            }
            ("smollm2-135m".into(), path)
        }
        ModelChoice::File(path) => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            (Arc::from(stem.as_ref()), path.clone())
        }
    };
    tracing::info!(path = %path.display(), "loading weights");
    let weights = Weights::load(&path).with_context(|| {
        "cannot load the model; `scripts/fetch-model.sh` fetches the default one again".to_owned()
    })?;
    Ok(LoadedModel { id, weights })
}

/// The text side of an embedded model: the given tokenizer, or the one in its weights.
pub(super) fn text_of_model(model: &LoadedModel, tokenizers: &[ModelPath]) -> anyhow::Result<ModelText> {
    let vocabulary = model.weights.tokenizer();
    let tokenizer = match ModelPath::find(&model.id, tokenizers) {
        Some(path) => load_tokenizer(path)?,
        None if vocabulary.merges.is_empty() => Tokenizer::bytes(),
        None => from_gguf(vocabulary)?,
    };
    let vocab = model.weights.config().vocab as usize;
    if tokenizer.vocab_size() > vocab {
        bail!(
            "the tokenizer knows {} tokens, the model {vocab}: give the model's own tokenizer",
            tokenizer.vocab_size()
        );
    }
    text(model.id.clone(), tokenizer, model.weights.config().context_tokens_max)
}

/// The text side of simulated engines: the given tokenizer, or bytes.
pub(super) fn text_of_simulation(
    id: Arc<str>,
    tokenizers: &[ModelPath],
    context_tokens_max: u32,
) -> anyhow::Result<ModelText> {
    let tokenizer =
        ModelPath::find(&id, tokenizers).map_or_else(|| Ok(Tokenizer::bytes()), load_tokenizer)?;
    text(id, tokenizer, context_tokens_max)
}

fn text(id: Arc<str>, tokenizer: Tokenizer, context_tokens_max: u32) -> anyhow::Result<ModelText> {
    let template = ChatTemplate::of(&tokenizer).context("the model's chat template cannot be used")?;
    let template = template.unwrap_or_else(ChatTemplate::chatml);
    let stop_tokens = tokenizer.eos().to_vec();
    Ok(ModelText { id, tokenizer, template, context_tokens_max, stop_tokens })
}

/// The text sides of models that attached engines may serve.
pub(super) fn texts_of_attached(tokenizers: &[ModelPath]) -> anyhow::Result<Vec<AttachedText>> {
    tokenizers.iter().map(|spec| text_of_attached(spec.model.as_deref(), &spec.path)).collect()
}

/// The text side of one of them, or of any.
pub(super) fn text_of_attached(model: Option<&str>, path: &Path) -> anyhow::Result<AttachedText> {
    let text = text("".into(), load_tokenizer(path)?, 0)?;
    let ModelText { tokenizer, template, stop_tokens, .. } = text;
    Ok(AttachedText { model: model.map(Arc::from), tokenizer, template, stop_tokens })
}

fn load_tokenizer(path: &Path) -> anyhow::Result<Tokenizer> {
    let path = &if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let metadata = GgufMetadata::read(path)?;
        return from_gguf(&metadata.tokenizer()?);
    }
    Tokenizer::from_json_file(path).with_context(|| format!("cannot load the tokenizer {}", path.display()))
}

fn from_gguf(vocabulary: &GgufTokenizer) -> anyhow::Result<Tokenizer> {
    let GgufTokenizer { tokens, merges, token_types, bos, eos, chat_template, pre, model: _, add_bos } =
        vocabulary.clone();
    let vocabulary = GgufVocabulary { tokens, merges, token_types, bos, eos, pre, add_bos, chat_template };
    Tokenizer::from_gguf_parts(vocabulary).context("the model's own tokenizer cannot be used")
}
