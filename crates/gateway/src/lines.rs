//! Records in files, one line of JSON each: decisions, for whoever wants to look further back than the ring, and arrivals.
//!
//! A thread of its own writes: a request never waits for a disk. What the disk cannot keep up with is dropped and
//! counted. A file that is full is renamed (`.1`, `.2`, …, the oldest goes), so that there are never more than so many.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde::Serialize;

/// Records that may wait for the disk: some megabytes.
const WAITING_MAX: usize = 1024;
/// Between two log lines about a disk that does not take what is written.
const COMPLAINTS_MIN: Duration = Duration::from_secs(60);

/// Where records go, and how much of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinkPlan {
    /// The newest file.
    pub path: PathBuf,
    /// Bytes of one file; a record is never parted.
    pub bytes_max: u64,
    /// Files at a time, the newest among them.
    pub files_max: usize,
}

/// Writes records to files.
#[derive(Debug)]
pub struct LineSink<T> {
    /// `None` only while it is dropped.
    records: Option<SyncSender<Arc<T>>>,
    writer: Option<JoinHandle<()>>,
    lost: Arc<AtomicU64>,
}

impl<T: Serialize + Send + Sync + 'static> LineSink<T> {
    /// Opens the file that a setting names, or goes on with one that is there.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn open(plan: SinkPlan, setting: &'static str) -> io::Result<Self> {
        let file = append(&plan.path)?;
        let bytes = file.metadata()?.len();
        let (records, received) = sync_channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let files = Files { plan, file, bytes };
        let counted = lost.clone();
        let writer = std::thread::Builder::new()
            .name(setting.to_owned())
            .spawn(move || write_all(files, &received, &counted, setting))?;
        Ok(Self { records: Some(records), writer: Some(writer), lost })
    }

    /// Takes a record to be written.
    pub(crate) fn put(&self, record: Arc<T>) {
        let taken = self.records.as_ref().map(|records| records.try_send(record));
        if !matches!(taken, Some(Ok(()))) {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Records that were not written, since the start.
    pub fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }
}

impl<T> Drop for LineSink<T> {
    /// Waits until what was taken is written.
    fn drop(&mut self) {
        self.records = None;
        if let Some(writer) = self.writer.take() {
            let _panicked = writer.join();
        }
    }
}

/// Writes what comes until nothing can come any more.
fn write_all<T: Serialize>(mut files: Files, records: &Receiver<Arc<T>>, lost: &AtomicU64, setting: &str) {
    let mut complained: Option<Instant> = None;
    for record in records {
        let line = serde_json::to_vec(&*record).map_err(io::Error::from);
        let Err(error) = line.and_then(|line| files.write(line)) else { continue };
        lost.fetch_add(1, Relaxed);
        if complained.is_none_or(|at| at.elapsed() >= COMPLAINTS_MIN) {
            let path = files.plan.path.display();
            tracing::warn!(%error, %path, "a record cannot be written; `{setting}` says where");
            complained = Some(Instant::now());
        }
    }
}

struct Files {
    plan: SinkPlan,
    file: File,
    bytes: u64,
}

impl Files {
    fn write(&mut self, mut line: Vec<u8>) -> io::Result<()> {
        line.push(b'\n');
        let bytes = line.len() as u64;
        if self.bytes > 0 && self.bytes + bytes > self.plan.bytes_max {
            self.rotate()?;
        }
        self.file.write_all(&line)?;
        self.bytes += bytes;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let SinkPlan { path, files_max, .. } = &self.plan;
        for number in (1..*files_max).rev() {
            let from = if number == 1 { path.clone() } else { numbered(path, number - 1) };
            match fs::rename(from, numbered(path, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if *files_max <= 1 {
            fs::remove_file(path)?;
        }
        self.file = append(path)?;
        self.bytes = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// `PATH.2`
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decisions::{DecisionRecord, tests::record};

    fn lines(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap_or_default();
        let ids = text.lines().map(|line| serde_json::from_str::<DecisionRecord>(line).expect("whole lines"));
        ids.map(|record| record.id.to_string()).collect()
    }

    #[test]
    fn records_are_appended_and_files_rotate() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("decisions.jsonl");
        let bytes = serde_json::to_vec(&record("r00")).expect("serialises").len() as u64 + 1;
        // Two records a file, and some bytes.
        let plan = SinkPlan { path: path.clone(), bytes_max: 2 * bytes + 5, files_max: 3 };
        for round in 0..2 {
            let sink = LineSink::open(plan.clone(), "decisions_file").expect("opens");
            (0..5).for_each(|n| sink.put(Arc::new(record(&format!("r{round}{n}")))));
            drop(sink);
        }
        assert_eq!(lines(&path), ["r13", "r14"]);
        assert_eq!(lines(&numbered(&path, 1)), ["r11", "r12"]);
        assert_eq!(lines(&numbered(&path, 2)), ["r04", "r10"], "the second round went on with the last file");
        assert!(!numbered(&path, 3).exists());
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 3);
    }

    #[test]
    fn one_file_begins_anew_and_a_large_record_has_one_of_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("d");
        let sink =
            LineSink::open(SinkPlan { path: path.clone(), bytes_max: 1, files_max: 1 }, "decisions_file")
                .expect("opens");
        (0..3).for_each(|n| sink.put(Arc::new(record(&format!("r{n}")))));
        drop(sink);
        assert_eq!(lines(&path), ["r2"]);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("none/decisions.jsonl");
        assert!(
            LineSink::<DecisionRecord>::open(SinkPlan { path, bytes_max: 1, files_max: 1 }, "d").is_err()
        );
    }
}
