//! Loads profiles of engines: built in, or from files.

use std::{fs::File, io::Read as _, path::Path, sync::Arc};

use anyhow::{Context as _, bail};
use forebay_gateway::orchestrator::ModelProfile;
use forebay_perf_model::{PROFILE_BYTES_MAX, Profile};

use crate::settings::model_path::ModelPath;

/// Every profile that the settings name.
pub(super) fn load(specs: &[ModelPath]) -> anyhow::Result<Vec<ModelProfile>> {
    specs.iter().map(|spec| one(spec).with_context(|| format!("profile {spec}"))).collect()
}

fn one(spec: &ModelPath) -> anyhow::Result<ModelProfile> {
    let profile = Arc::new(profile_named(&spec.path)?);
    Ok(ModelProfile { model: spec.model.as_deref().map(Into::into), profile })
}

/// A profile by its built-in name or its file.
///
/// # Errors
/// It is neither, or says what cannot be.
pub(crate) fn profile_named(path: &Path) -> anyhow::Result<Profile> {
    match path.to_str().and_then(Profile::built_in) {
        Some(profile) => Ok(profile),
        None => Ok(Profile::parse(&read(path)?)?),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let names = || Profile::BUILT_IN.join(", ");
    let file = File::open(path)
        .with_context(|| format!("no such file can be read, and the profiles built in are {}", names()))?;
    let mut text = String::new();
    // One byte more than a profile may have: then it is too long, and parsing says so.
    file.take(PROFILE_BYTES_MAX as u64 + 1).read_to_string(&mut text).context("it is not text")?;
    if text.is_empty() {
        bail!("the file is empty");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(model: Option<&str>, path: &str) -> ModelPath {
        ModelPath { model: model.map(str::to_owned), path: path.into() }
    }

    #[test]
    fn built_in_profiles_load_by_name_and_others_from_files() {
        let loaded =
            load(&[spec(Some("org/m"), "h100-llama8b"), spec(None, "h100x2-qwen3-30b-a3b")]).unwrap();
        assert_eq!((loaded[0].model.as_deref(), loaded[0].profile.name()), (Some("org/m"), "h100-llama8b"));
        assert!(loaded[1].model.is_none() && loaded[1].profile.is_of_group());

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        for (text, said) in
            [("", "the file is empty"), ("{}", "missing"), (&*"x".repeat(PROFILE_BYTES_MAX + 1), "65536")]
        {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", load(&[spec(None, path.to_str().unwrap())]).unwrap_err());
            assert!(error.contains(said) && error.contains("profile.json"), "{error}");
        }
        let error = format!("{:#}", load(&[spec(None, "h100-llama-8b")]).unwrap_err());
        assert!(error.contains("h100-llama8b, h100x2"), "{error}");
    }
}
