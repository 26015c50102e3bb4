//! What an engine prints: a file that it writes, read as it grows, and the last lines of it in memory.
//!
//! In: a file that a process appends to. Out: lines. Start at [`LogTail::read`]; [`LogRing`] keeps the last lines for
//! whoever asks.
//!
//! The engine writes to a file and not to a pipe because it goes on writing while no agent reads. A file that a process
//! holds open cannot be replaced, so when it exceeds [`LOG_FILE_BYTES_MAX`] it is copied to a second file and cut to
//! nothing; since the engine appends, it goes on at the beginning. Together they hold at most twice the bound, and what the
//! engine writes between two reads, or while it has no agent. Lines written in the instant between copy and cut are lost.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use forebay_proto::{clip, limits::LOG_LINE_BYTES_MAX};
use parking_lot::Mutex;

/// Bytes after which the log begins anew.
pub const LOG_FILE_BYTES_MAX: u64 = 16 << 20;
/// Lines in memory; what one answer to a gateway may hold.
pub const LOG_LINES_MAX: usize = forebay_proto::limits::LOG_LINES_MAX;
/// Bytes read at a time.
const READ_BYTES: usize = 64 * 1024;
/// Bytes read in one call; the rest waits for the next.
const READ_BYTES_MAX: usize = 1 << 20;
/// Bytes at the end of an earlier agent's log that are read again.
const CATCH_UP_BYTES: u64 = 256 * 1024;

/// The last lines of a log, shared by whoever writes and whoever asks.
#[derive(Debug, Clone, Default)]
pub struct LogRing {
    lines: Arc<Mutex<VecDeque<Arc<str>>>>,
}

impl LogRing {
    /// Adds a line; the oldest goes beyond [`LOG_LINES_MAX`].
    pub fn push(&self, line: &str) {
        let mut lines = self.lines.lock();
        if lines.len() == LOG_LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line.into());
    }

    /// The last `count` lines, oldest first.
    pub fn tail(&self, count: usize) -> Vec<Arc<str>> {
        let lines = self.lines.lock();
        lines.iter().skip(lines.len().saturating_sub(count)).cloned().collect()
    }
}

/// Reads a growing log.
#[derive(Debug)]
pub struct LogTail {
    path: PathBuf,
    earlier: PathBuf,
    offset: u64,
    /// A line that has no end yet; at most [`LOG_LINE_BYTES_MAX`] bytes.
    partial: Vec<u8>,
    /// What of that line was beyond the bound.
    cut: bool,
    /// The file is another's: it is never cut.
    read_only: bool,
}

impl LogTail {
    /// Of the log at `path`, from its beginning; `earlier` is where it goes when it is full.
    pub fn new(path: impl Into<PathBuf>, earlier: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            earlier: earlier.into(),
            offset: 0,
            partial: Vec::new(),
            cut: false,
            read_only: false,
        }
    }

    /// Of a log that an earlier agent read, from shortly before its end.
    pub fn catch_up(path: impl Into<PathBuf>, earlier: impl Into<PathBuf>) -> Self {
        let mut tail = Self::new(path, earlier);
        let bytes = fs::metadata(&tail.path).map_or(0, |found| found.len());
        tail.offset = bytes.saturating_sub(CATCH_UP_BYTES);
        // The first piece of a line is no line.
        tail.cut = tail.offset > 0;
        tail
    }

    /// The same for somebody who only looks.
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// Reads what is new, up to a bound, and gives the number of bytes; the caller comes again at once if there were any.
    ///
    /// # Errors
    /// The file cannot be read. One that is not there yet is empty.
    pub fn read(&mut self, mut line: impl FnMut(&str)) -> io::Result<usize> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() < self.offset {
            self.offset = 0; // somebody cut it
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = vec![0; READ_BYTES];
        let mut total = 0;
        while total < READ_BYTES_MAX {
            let count = file.read(&mut bytes)?;
            if count == 0 {
                break;
            }
            total += count;
            self.offset += count as u64;
            self.take(&bytes[..count], &mut line);
        }
        if total < READ_BYTES_MAX && self.offset > LOG_FILE_BYTES_MAX && !self.read_only {
            self.turn_over()?;
        }
        Ok(total)
    }

    /// The rest of a last line without an end.
    pub fn finish(&mut self, mut line: impl FnMut(&str)) {
        self.end_line(&mut line);
    }

    /// Lines end with a line feed; a bar that is drawn over and over ends with a carriage return.
    fn take(&mut self, bytes: &[u8], line: &mut impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n' || byte == b'\r') {
            let ends = piece.ends_with(b"\n") || piece.ends_with(b"\r");
            let text = if ends { &piece[..piece.len() - 1] } else { piece };
            if !self.cut {
                let room = LOG_LINE_BYTES_MAX.saturating_sub(self.partial.len());
                self.cut = text.len() > room;
                self.partial.extend_from_slice(&text[..text.len().min(room)]);
            }
            if ends {
                self.end_line(line);
            }
        }
    }

    fn end_line(&mut self, line: &mut impl FnMut(&str)) {
        let text: String = String::from_utf8_lossy(&self.partial)
            .chars()
            .map(|letter| if letter.is_control() && letter != '\t' { ' ' } else { letter })
            .collect();
        self.partial.clear();
        self.cut = false;
        let text = text.trim_end();
        if !text.is_empty() {
            line(&clip(text, LOG_LINE_BYTES_MAX));
        }
    }

    fn turn_over(&mut self) -> io::Result<()> {
        fs::copy(&self.path, &self.earlier)?;
        File::options().write(true).open(&self.path)?.set_len(0)?;
        self.offset = 0;
        Ok(())
    }
}

/// Makes room for the log of a new life: the last one's becomes the earlier one.
///
/// # Errors
/// The folder cannot be written.
pub fn begin(path: &Path, earlier: &Path) -> io::Result<()> {
    match fs::rename(path, earlier) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(tail: &mut LogTail) -> Vec<String> {
        let mut lines = Vec::new();
        while tail.read(|line| lines.push(line.to_owned())).expect("readable") > 0 {}
        lines
    }

    fn appender(path: &Path) -> File {
        File::options().create(true).append(true).open(path).expect("created")
    }

    #[test]
    fn lines_come_as_they_are_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, earlier) = (folder.path().join("log"), folder.path().join("log.1"));
        let mut tail = LogTail::new(&path, &earlier);
        assert_eq!(read(&mut tail), Vec::<String>::new(), "no file yet");
        let mut file = appender(&path);
        file.write_all(b"one\ntwo").expect("written");
        assert_eq!(read(&mut tail), ["one"]);
        file.write_all(b" and more\n\n10%|#\r50%|###\rthr\xffee \x1b[0m \n").expect("written");
        assert_eq!(read(&mut tail), ["two and more", "10%|#", "50%|###", "thr\u{fffd}ee  [0m"]);
        file.write_all(b"the last").expect("written");
        assert_eq!(read(&mut tail), Vec::<String>::new());
        let mut last = Vec::new();
        tail.finish(|line| last.push(line.to_owned()));
        assert_eq!(last, ["the last"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let mut file = appender(&path);
        file.write_all(&vec![b'x'; 3 * READ_BYTES]).expect("written");
        file.write_all(b"\nnext\n").expect("written");
        let lines = read(&mut LogTail::new(&path, folder.path().join("log.1")));
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [LOG_LINE_BYTES_MAX, 4]);
    }

    #[test]
    fn a_full_log_begins_anew_and_the_writer_goes_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, earlier) = (folder.path().join("log"), folder.path().join("log.1"));
        let mut tail = LogTail::new(&path, &earlier);
        let mut file = appender(&path);
        let line = vec![b'x'; 1023];
        let mut count = 0;
        for _ in 0..LOG_FILE_BYTES_MAX / 1024 + 1 {
            file.write_all(&line).and_then(|()| file.write_all(b"\n")).expect("written");
        }
        while tail.read(|_| count += 1).expect("readable") > 0 {}
        assert_eq!(count, LOG_FILE_BYTES_MAX / 1024 + 1);
        assert_eq!(fs::metadata(&path).expect("there").len(), 0);
        assert_eq!(fs::metadata(&earlier).expect("there").len(), LOG_FILE_BYTES_MAX + 1024);
        file.write_all(b"goes on\n").expect("written");
        assert_eq!(read(&mut tail), ["goes on"]);
        assert_eq!(fs::metadata(&path).expect("there").len(), 8);
    }

    #[test]
    fn a_second_reader_catches_up_with_whole_lines() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, earlier) = (folder.path().join("log"), folder.path().join("log.1"));
        let mut file = appender(&path);
        for number in 0..40_000 {
            writeln!(file, "line {number}").expect("written");
        }
        let lines = read(&mut LogTail::catch_up(&path, &earlier));
        let first: u32 =
            lines[0].strip_prefix("line ").and_then(|number| number.parse().ok()).expect("a whole line");
        assert_eq!(
            (first as usize + lines.len(), lines.last().map(String::as_str)),
            (40_000, Some("line 39999"))
        );
        assert!(first > 0);
        begin(&path, &earlier).expect("moved");
        assert!(!path.exists() && earlier.exists());
    }

    #[test]
    fn the_ring_keeps_the_last_lines() {
        let ring = LogRing::default();
        (0..LOG_LINES_MAX + 5).for_each(|number| ring.push(&number.to_string()));
        let all = ring.tail(usize::MAX);
        assert_eq!((all.len(), &*all[0], &*all[LOG_LINES_MAX - 1]), (LOG_LINES_MAX, "5", "1004"));
        assert_eq!(ring.tail(2).iter().map(|line| &**line).collect::<Vec<_>>(), ["1003", "1004"]);
    }
}
