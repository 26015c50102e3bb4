//! A tokenizer's files in pieces: [`tokenizer_chunks`] cuts, [`TokenizerReader`] puts together.

use bytes::Bytes;

use crate::{
    error::WireError,
    limits::{TOKENIZER_BYTES_MAX, TOKENIZER_CHUNK_BYTES_MAX, TOKENIZER_FILES_MAX},
    text::{name, sentence},
    v1,
};

/// One file of the model's folder that belongs to its tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFile {
    /// A plain file name, never a path.
    pub name: String,
    /// All of it.
    pub bytes: Bytes,
}

/// The pieces of an answer, in order.
///
/// # Errors
/// What the other side would refuse: no files, too many, too large, a name that is a path.
pub fn tokenizer_chunks(
    request_id: u64,
    files: &[TokenizerFile],
) -> Result<impl Iterator<Item = v1::Tokenizer> + '_, WireError> {
    if files.is_empty() {
        return Err(WireError::Missing { message: "a tokenizer", field: "file" });
    }
    WireError::at_most("a tokenizer", "files", files.len(), TOKENIZER_FILES_MAX)?;
    let total = files.iter().map(|file| file.bytes.len()).sum();
    WireError::at_most("a tokenizer", "bytes", total, TOKENIZER_BYTES_MAX as usize)?;
    for file in files {
        file_name(file.name.clone())?;
    }
    Ok(files.iter().enumerate().flat_map(move |(index, file)| {
        let chunks = file.bytes.len().div_ceil(TOKENIZER_CHUNK_BYTES_MAX).max(1);
        (0..chunks).map(move |chunk| {
            let start = chunk * TOKENIZER_CHUNK_BYTES_MAX;
            let end = file.bytes.len().min(start + TOKENIZER_CHUNK_BYTES_MAX);
            v1::Tokenizer {
                request_id,
                file: file.name.clone(),
                file_bytes: file.bytes.len() as u64,
                offset: start as u64,
                data: file.bytes.slice(start..end),
                last: index + 1 == files.len() && chunk + 1 == chunks,
                unavailable: String::new(),
            }
        })
    }))
}

/// The answer of an agent that has no tokenizer to give.
pub fn tokenizer_unavailable(request_id: u64, why: &str) -> v1::Tokenizer {
    let why = if why.is_empty() { "the agent gave no reason" } else { why };
    v1::Tokenizer {
        request_id,
        last: true,
        unavailable: sentence(why.to_owned()),
        ..v1::Tokenizer::default()
    }
}

/// A name that is safe to create in a folder.
fn file_name(text: String) -> Result<String, WireError> {
    let what = "the name of a tokenizer's file";
    let text = name(what, text)?;
    if text.contains(['/', '\\']) || text.starts_with('.') {
        return Err(WireError::Text { what, wrong: "is not a plain file name" });
    }
    Ok(text)
}

/// Puts the answer to one `RequestTokenizer` together.
#[derive(Debug, Default)]
pub struct TokenizerReader {
    files: Vec<TokenizerFile>,
    /// The file under way: name, size, what came.
    open: Option<(String, u64, Vec<u8>)>,
    bytes: u64,
}

impl TokenizerReader {
    /// Takes the next piece; gives the outcome with the last one: the files, or the sentence why there are none.
    ///
    /// # Errors
    /// Too much, or a piece that does not continue the one before. Drop the reader and ask again.
    pub fn take(
        &mut self,
        piece: v1::Tokenizer,
    ) -> Result<Option<Result<Vec<TokenizerFile>, String>>, WireError> {
        let v1::Tokenizer { request_id: _, file, file_bytes, offset, data, last, unavailable } = piece;
        if !unavailable.is_empty() {
            return Ok(Some(Err(sentence(unavailable))));
        }
        let broken = |wrong: String| WireError::Sequence { what: "a tokenizer", wrong };
        WireError::at_most("a piece of a tokenizer", "bytes", data.len(), TOKENIZER_CHUNK_BYTES_MAX)?;
        let (name, size, mut content) = match self.open.take() {
            Some(open) => open,
            None => self.begin(file.clone(), file_bytes)?,
        };
        if (&name, size, content.len() as u64) != (&file, file_bytes, offset) {
            return Err(broken(format!(
                "byte {offset} of {file} came after byte {} of {name}",
                content.len()
            )));
        }
        content.extend_from_slice(&data);
        let got = content.len() as u64;
        if got > size {
            return Err(broken(format!("{name} is longer than its {size} bytes")));
        }
        if got == size {
            self.files.push(TokenizerFile { name, bytes: content.into() });
        } else if last || data.is_empty() {
            return Err(broken(format!("{name} ends after {got} of {size} bytes")));
        } else {
            self.open = Some((name, size, content));
        }
        Ok(last.then(|| Ok(std::mem::take(&mut self.files))))
    }

    fn begin(&mut self, file: String, size: u64) -> Result<(String, u64, Vec<u8>), WireError> {
        let file = file_name(file)?;
        WireError::at_most("a tokenizer", "files", self.files.len() + 1, TOKENIZER_FILES_MAX)?;
        if self.files.iter().any(|known| known.name == file) {
            let wrong = format!("{file} comes twice");
            return Err(WireError::Sequence { what: "a tokenizer", wrong });
        }
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > TOKENIZER_BYTES_MAX {
            let (got, max) = (self.bytes, TOKENIZER_BYTES_MAX);
            return Err(WireError::TooMuch { what: "a tokenizer", got, max, unit: "bytes" });
        }
        Ok((file, size, Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: usize) -> TokenizerFile {
        let bytes: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
        TokenizerFile { name: name.to_owned(), bytes: bytes.into() }
    }

    #[test]
    fn files_of_all_sizes_come_back() {
        let files = [
            file("tokenizer.json", 2 * TOKENIZER_CHUNK_BYTES_MAX + 1),
            file("empty.json", 0),
            file("exact.json", TOKENIZER_CHUNK_BYTES_MAX),
        ];
        let pieces: Vec<_> = tokenizer_chunks(5, &files).expect("within the bounds").collect();
        assert_eq!(pieces.len(), 3 + 1 + 1);
        let mut reader = TokenizerReader::default();
        let (last, before) = pieces.split_last().expect("not empty");
        for piece in before {
            assert_eq!(reader.take(piece.clone()), Ok(None));
        }
        assert_eq!(reader.take(last.clone()), Ok(Some(Ok(files.to_vec()))));
    }

    #[test]
    fn a_reason_comes_back_instead_of_files() {
        let answer = TokenizerReader::default()
            .take(tokenizer_unavailable(5, "the model's folder is on another host"));
        assert_eq!(answer, Ok(Some(Err("the model's folder is on another host".to_owned()))));
        assert!(!tokenizer_unavailable(5, "").unavailable.is_empty(), "an answer without files has a reason");
    }

    #[test]
    fn pieces_that_do_not_fit_and_names_that_are_paths_are_refused() {
        let files = [file("a.json", 2 * TOKENIZER_CHUNK_BYTES_MAX), file("b.json", 1)];
        let pieces: Vec<_> = tokenizer_chunks(5, &files).expect("within the bounds").collect();
        let named = |name: &str| v1::Tokenizer { file: name.to_owned(), ..pieces[2].clone() };
        let rows: [(&[v1::Tokenizer], &str); 9] = [
            (&[pieces[1].clone()], "byte 262144 of a.json came after byte 0"),
            (&[pieces[0].clone(), pieces[0].clone()], "byte 0 of a.json came after byte 262144"),
            (&[pieces[0].clone(), pieces[2].clone()], "byte 0 of b.json came after byte 262144 of a.json"),
            (
                &[v1::Tokenizer { last: true, ..pieces[0].clone() }],
                "a.json ends after 262144 of 524288 bytes",
            ),
            (
                &[v1::Tokenizer { data: Bytes::new(), ..pieces[0].clone() }],
                "a.json ends after 0 of 524288 bytes",
            ),
            (&[v1::Tokenizer { file_bytes: u64::MAX, ..pieces[0].clone() }], "at most 134217728 are allowed"),
            (&[named("../b.json")], "is not a plain file name"),
            (&[named(".ssh")], "is not a plain file name"),
            (&[v1::Tokenizer { last: false, ..named("b.json") }, named("b.json")], "b.json comes twice"),
        ];
        for (pieces, wrong) in rows {
            let mut reader = TokenizerReader::default();
            let (last, before) = pieces.split_last().expect("not empty");
            for piece in before {
                assert_eq!(reader.take(piece.clone()), Ok(None));
            }
            let error = reader.take(last.clone()).expect_err(wrong).to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert!(tokenizer_chunks(5, &[]).is_err() && tokenizer_chunks(5, &[file("a/b", 1)]).is_err());
    }
}
