//! Why a model cannot be used.

use std::{io, path::PathBuf};

/// Why a model file was refused. Each names the file; none leaves anything loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is not there or may not be read.
    #[error("cannot open model file {}: fetch it first, or give the path of a GGUF file", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Reading stopped half way.
    #[error("cannot read model file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file does not begin like a GGUF file.
    #[error("model file {} is not a GGUF file: give the path of one, or fetch it again", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
    },
    /// The file contradicts itself or is cut short.
    #[error("model file {} is corrupt at byte {offset}: {what}; fetch it again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where it was noticed.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// Something that every llama model has is not there.
    #[error("model file {} lacks {what}; give a complete llama model", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What is not there.
        what: String,
    },
    /// The file is sound, but asks for something that this engine does not compute.
    #[error("model file {} cannot be used: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for, and what would be accepted.
        what: String,
    },
}
