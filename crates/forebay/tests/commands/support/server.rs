//! A scripted HTTP/1.1 server on a port of the system's choice.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

/// No test waits longer than this for what must happen at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// One request, as it came.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    /// `GET /v1/models`.
    pub(crate) line: String,
    /// Lines of the head, lower case names.
    pub(crate) head: Vec<String>,
    /// The body.
    pub(crate) body: String,
}

/// One answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    head: Vec<String>,
    body: String,
    hold: bool,
}

impl Reply {
    /// A JSON body.
    pub(crate) fn json(body: &str) -> Self {
        Self {
            status: 200,
            head: vec!["content-type: application/json".to_owned()],
            body: body.to_owned(),
            hold: false,
        }
    }

    /// A stream of events, one for each text; those that begin with `event:` are whole.
    pub(crate) fn events(id: &str, events: &[&str]) -> Self {
        let one = |event: &&str| match event.starts_with("event:") {
            true => format!("{event}\n\n"),
            false => format!("data: {event}\n\n"),
        };
        Self {
            status: 200,
            head: vec!["content-type: text/event-stream".to_owned(), format!("x-request-id: {id}")],
            body: events.iter().map(one).collect(),
            hold: false,
        }
    }

    /// With another status.
    pub(crate) fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// Sends what there is and waits for the client to hang up, which [`Server::client_hung_up`] sees.
    pub(crate) fn then_hold(mut self) -> Self {
        self.hold = true;
        self
    }
}

/// The server; it ends with the test.
pub(crate) struct Server {
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Recorded>>>,
    hang_ups: Receiver<()>,
}

impl Server {
    /// Answers each request with what `script` says.
    pub(crate) fn start(script: impl Fn(&Recorded) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (hung_up, hang_ups) = sync_channel(16);
        let (script, seen) = (Arc::new(script), requests.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (script, seen, hung_up) = (script.clone(), seen.clone(), hung_up.clone());
                thread::spawn(move || serve(stream, &*script, &seen, &hung_up));
            }
        });
        Self { url, requests, hang_ups }
    }

    /// Answers by path; 404 for any other.
    pub(crate) fn with_pages(pages: &[(&str, Reply)]) -> Self {
        let pages: Vec<_> = pages.iter().map(|(line, reply)| ((*line).to_owned(), reply.clone())).collect();
        Self::start(move |request| {
            let page = pages.iter().find(|(line, _)| *line == request.line);
            page.map_or_else(not_found, |(_, reply)| reply.clone())
        })
    }

    /// Host and port.
    pub(crate) fn authority(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// Everything that was asked.
    pub(crate) fn requests(&self) -> Vec<Recorded> {
        self.requests.lock().expect("no test panics while it holds this").clone()
    }

    /// Waits until a client hung up on a held reply.
    pub(crate) fn client_hung_up(&self) {
        self.hang_ups.recv_timeout(PATIENCE).expect("the client hangs up");
    }
}

fn not_found() -> Reply {
    Reply::json(
        r#"{"error":{"message":"there is nothing here","type":"invalid_request_error","code":"not_found"}}"#,
    )
    .status(404)
}

/// One request, one reply, then the connection closes.
fn serve(
    stream: TcpStream,
    script: &dyn Fn(&Recorded) -> Reply,
    seen: &Mutex<Vec<Recorded>>,
    hung_up: &SyncSender<()>,
) {
    let mut reader = BufReader::new(stream);
    let Some(request) = read(&mut reader) else { return };
    let reply = script(&request);
    seen.lock().expect("no test panics while it holds this").push(request);
    let length = if reply.hold { String::new() } else { format!("content-length: {}\r\n", reply.body.len()) };
    let head: String = reply.head.iter().map(|line| format!("{line}\r\n")).collect();
    let text = format!(
        "HTTP/1.1 {} Scripted\r\n{head}{length}connection: close\r\n\r\n{}",
        reply.status, reply.body
    );
    // A client may hang up at any time; that is what some tests are about.
    let _ = reader.get_mut().write_all(text.as_bytes());
    if reply.hold {
        let _ = reader.read_to_end(&mut Vec::new());
        let _ = hung_up.try_send(());
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Recorded> {
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut head = Vec::new();
    loop {
        match line()? {
            end if end.is_empty() => break,
            header => {
                let (name, value) = header.split_once(':')?;
                head.push(format!("{}:{value}", name.to_ascii_lowercase()));
            }
        }
    }
    let length = head
        .iter()
        .find_map(|header| header.strip_prefix("content-length: "))
        .map_or(Some(0), |l| l.parse().ok())?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Recorded {
        line: first.strip_suffix(" HTTP/1.1")?.to_owned(),
        head,
        body: String::from_utf8(body).ok()?,
    })
}
