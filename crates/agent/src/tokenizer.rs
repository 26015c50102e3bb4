//! The tokenizer's files, from the folder of the model that the engine serves.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use forebay_proto::{
    TokenizerFile, limits::TOKENIZER_BYTES_MAX, tokenizer_chunks, tokenizer_unavailable, v1,
};

/// What a gateway needs to tokenise as the engine does. The first is required.
const FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
];

/// Where the files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// In this folder.
    Folder(PathBuf),
    /// Nowhere that the agent can read, as a sentence.
    Unknown(String),
}

impl Source {
    /// The folder of a model: where the user says, else what the command names if that is a folder, else what the hub's
    /// cache on this host has for that name.
    pub(crate) fn find(told: Option<&Path>, model: Option<&str>, hub_cache: Option<&Path>) -> Self {
        if let Some(told) = told {
            return Self::Folder(told.to_owned());
        }
        let Some(model) = model else {
            return Self::Unknown(
                "the engine's command names no model; give the agent --tokenizer FOLDER".to_owned(),
            );
        };
        let folder = Path::new(model);
        if folder.join(FILES[0]).is_file() {
            return Self::Folder(folder.to_owned());
        }
        if let Some(snapshot) = hub_cache.and_then(|cache| snapshot(cache, model)) {
            return Self::Folder(snapshot);
        }
        let why = format!(
            "there is no {} for {model} on the engine's host; give the agent --tokenizer FOLDER",
            FILES[0]
        );
        Self::Unknown(why)
    }
}

/// The snapshot of `org/name` that its main revision points to.
fn snapshot(cache: &Path, model: &str) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", model.replace('/', "--")));
    let mut revision = String::new();
    File::open(folder.join("refs/main")).ok()?.take(256).read_to_string(&mut revision).ok()?;
    let snapshot = folder.join("snapshots").join(revision.trim());
    snapshot.join(FILES[0]).is_file().then_some(snapshot)
}

/// Reads the files and cuts them into pieces.
pub(crate) fn answer(source: &Source, request_id: u64) -> Vec<v1::Tokenizer> {
    let folder = match source {
        Source::Folder(folder) => folder,
        Source::Unknown(why) => return vec![tokenizer_unavailable(request_id, why)],
    };
    let answered = read(folder).map_err(|error| error.to_string()).and_then(|files| {
        let chunks = tokenizer_chunks(request_id, &files).map_err(|error| error.to_string())?;
        Ok(chunks.collect())
    });
    answered.unwrap_or_else(|why| {
        vec![tokenizer_unavailable(
            request_id,
            &format!("cannot read the tokenizer in {}: {why}", folder.display()),
        )]
    })
}

fn read(folder: &Path) -> io::Result<Vec<TokenizerFile>> {
    let mut files = Vec::new();
    let mut room = TOKENIZER_BYTES_MAX;
    for name in FILES {
        let file = match File::open(folder.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !files.is_empty() => continue,
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(room + 1).read_to_end(&mut bytes)?;
        room = room.checked_sub(bytes.len() as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {TOKENIZER_BYTES_MAX} bytes"))
        })?;
        files.push(TokenizerFile { name: name.to_owned(), bytes: bytes.into() });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use forebay_proto::TokenizerReader;

    use super::*;

    fn received(source: &Source) -> Result<Vec<TokenizerFile>, String> {
        let mut reader = TokenizerReader::default();
        let mut pieces = answer(source, 3).into_iter();
        loop {
            let piece = pieces.next().expect("a last piece");
            assert_eq!(piece.request_id, 3);
            if let Some(outcome) = reader.take(piece).expect("pieces that fit") {
                return outcome;
            }
        }
    }

    #[test]
    fn the_files_that_are_there_are_sent_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let source = Source::find(None, folder.path().to_str(), None);
        assert!(
            matches!(&source, Source::Unknown(why) if why.contains("there is no tokenizer.json for")),
            "{source:?}"
        );
        fs::write(folder.path().join("tokenizer.json"), vec![b'x'; 600_000]).expect("written");
        fs::write(folder.path().join("chat_template.jinja"), "{{ x }}").expect("written");
        fs::write(folder.path().join("model.safetensors"), "weights").expect("written");
        let source = Source::find(None, folder.path().to_str(), None);
        let files = received(&source).expect("files");
        let sizes: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.bytes.len())).collect();
        assert_eq!(sizes, [("tokenizer.json", 600_000), ("chat_template.jinja", 7)]);
    }

    #[test]
    fn a_name_is_looked_up_in_the_hub_s_cache() {
        let cache = tempfile::tempdir().expect("a folder");
        let folder = cache.path().join("models--org--name");
        fs::create_dir_all(folder.join("snapshots/abc")).expect("made");
        fs::create_dir_all(folder.join("refs")).expect("made");
        fs::write(folder.join("refs/main"), "abc\n").expect("written");
        assert!(matches!(Source::find(None, Some("org/name"), Some(cache.path())), Source::Unknown(_)));
        fs::write(folder.join("snapshots/abc/tokenizer.json"), "{}").expect("written");
        let source = Source::find(None, Some("org/name"), Some(cache.path()));
        assert_eq!(source, Source::Folder(folder.join("snapshots/abc")));
        assert_eq!(received(&source).expect("files").len(), 1);
    }

    #[test]
    fn a_tokenizer_that_cannot_be_had_is_explained() {
        let rows = [
            (Source::find(None, None, None), "the engine's command names no model"),
            (
                Source::find(Some(Path::new("/nowhere")), Some("m"), None),
                "cannot read the tokenizer in /nowhere",
            ),
        ];
        for (source, why) in rows {
            let said = received(&source).expect_err("unavailable");
            assert!(said.contains(why), "{said}");
        }
    }
}
