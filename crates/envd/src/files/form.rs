//! The body of a form (multipart/form-data, RFC 7578), a piece at a time.
//!
//! A state machine over bytes: it does no I/O and never holds more than one part's head or the length of one delimiter, whatever the body
//! is and however it is cut into pieces. What it does not understand it refuses; it never guesses where a part may end.
//!
//! ```text
//!  Preamble --delimiter--> Line --line end--> Head --blank line--> Content --delimiter--> Line
//!                           '--"--"--> Epilogue
//! ```

use bytes::{Buf as _, Bytes, BytesMut};

/// What may come before the first delimiter and after the last one. Clients send nothing there, old ones a line of text.
const MARGIN_BYTES_MAX: usize = 1024;
/// The head of one part: a name as long as a path may be, twice over for its escapes, and a few words beside it.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// White space that may follow a delimiter on its line.
const PADDING_BYTES_MAX: usize = 64;
/// A file name is a path (Linux: 4096 bytes).
const NAME_BYTES_MAX: usize = 4096;
/// Files and other fields together; a client with more files sends more forms.
pub const PARTS_MAX: usize = 1000;
/// RFC 2046, 5.1.1.
const BOUNDARY_BYTES_MAX: usize = 70;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the content type names no usable boundary")]
    Boundary,
    #[error("the form does not begin with its boundary")]
    Preamble,
    #[error("a boundary is followed by something else than a line end")]
    Line,
    #[error("the head of a part is longer than {HEAD_BYTES_MAX} bytes")]
    LongHead,
    #[error("the head of a part cannot be read")]
    Head,
    #[error("a part has no name")]
    Nameless,
    #[error("a name is longer than {NAME_BYTES_MAX} bytes")]
    LongName,
    #[error("parts must be sent as they are, without a transfer encoding")]
    Encoded,
    #[error("the form has more than {PARTS_MAX} parts")]
    Parts,
    #[error("too much follows the end of the form")]
    Epilogue,
    #[error("the form ends before its last boundary")]
    CutOff,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Part(Part),
    /// Some of the part's bytes; never empty.
    Content(Bytes),
    PartEnd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub name: String,
    pub file_name: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    Line,
    Head,
    Content,
    Epilogue,
}

pub struct Parser {
    /// Line end, two dashes, boundary.
    delimiter: Vec<u8>,
    state: State,
    /// What was pushed and not yet understood.
    rest: Bytes,
    /// Bytes before the first or after the last delimiter.
    margin: usize,
    parts: usize,
}

impl Parser {
    /// `None` when the content type is no form's.
    pub fn of_type(content_type: &str) -> Option<Result<Self, Malformed>> {
        let (kind, rest) = content_type.split_at(content_type.find(';').unwrap_or(content_type.len()));
        if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
            return None;
        }
        let boundary = parameters(rest).and_then(|all| value_of(&all, "boundary")).unwrap_or_default();
        let usable = (1..=BOUNDARY_BYTES_MAX).contains(&boundary.len())
            && boundary.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        Some(if usable { Ok(Self::new(&boundary)) } else { Err(Malformed::Boundary) })
    }

    fn new(boundary: &str) -> Self {
        Self {
            delimiter: [b"\r\n--", boundary.as_bytes()].concat(),
            state: State::Preamble,
            // The first delimiter needs no line end before it: this is the one it is given.
            rest: Bytes::from_static(b"\r\n"),
            margin: 0,
            parts: 0,
        }
    }

    /// To be called when [`Self::next`] has nothing more.
    pub fn push(&mut self, piece: Bytes) {
        if self.rest.is_empty() {
            self.rest = piece;
            return;
        }
        let mut joined = BytesMut::with_capacity(self.rest.len() + piece.len());
        joined.extend_from_slice(&self.rest);
        joined.extend_from_slice(&piece);
        self.rest = joined.freeze();
    }

    /// `None`: more bytes are needed.
    pub fn next(&mut self) -> Result<Option<Event>, Malformed> {
        loop {
            match self.state {
                State::Preamble => {
                    let found = self.find_delimiter();
                    self.margin += found.before();
                    if self.margin > MARGIN_BYTES_MAX {
                        return Err(Malformed::Preamble);
                    }
                    self.rest.advance(found.before());
                    let Found::Delimiter(_) = found else { return Ok(None) };
                    self.begin_line();
                }
                State::Line => {
                    if self.rest.starts_with(b"--") {
                        self.state = State::Epilogue;
                        self.margin = 0;
                        continue;
                    }
                    let padding = self.rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
                    match self.rest[padding..] {
                        _ if padding > PADDING_BYTES_MAX => return Err(Malformed::Line),
                        [] | [b'\r'] => return Ok(None),
                        [b'\r', b'\n', ..] => self.rest.advance(padding + 2),
                        [b'-'] if padding == 0 => return Ok(None),
                        _ => return Err(Malformed::Line),
                    }
                    self.parts += 1;
                    if self.parts > PARTS_MAX {
                        return Err(Malformed::Parts);
                    }
                    self.state = State::Head;
                }
                State::Head => {
                    let end = self.rest.windows(4).take(HEAD_BYTES_MAX).position(|four| four == b"\r\n\r\n");
                    let Some(end) = end else {
                        // Not before the last end that is looked for is there in full, however the body is cut.
                        let endless = self.rest.len() >= HEAD_BYTES_MAX + 3;
                        return if endless { Err(Malformed::LongHead) } else { Ok(None) };
                    };
                    let head = self.rest.split_to(end + 4);
                    self.state = State::Content;
                    return part(&head[..end]).map(|part| Some(Event::Part(part)));
                }
                State::Content => {
                    let found = self.find_delimiter();
                    if found.before() > 0 {
                        return Ok(Some(Event::Content(self.rest.split_to(found.before()))));
                    }
                    let Found::Delimiter(_) = found else { return Ok(None) };
                    self.begin_line();
                    return Ok(Some(Event::PartEnd));
                }
                State::Epilogue => {
                    self.margin += self.rest.len();
                    self.rest.clear();
                    return if self.margin > MARGIN_BYTES_MAX { Err(Malformed::Epilogue) } else { Ok(None) };
                }
            }
        }
    }

    /// Whether the body may end here.
    pub fn finish(&self) -> Result<(), Malformed> {
        match self.state {
            State::Epilogue => Ok(()),
            State::Preamble => Err(Malformed::Preamble),
            _ => Err(Malformed::CutOff),
        }
    }

    fn begin_line(&mut self) {
        self.rest.advance(self.delimiter.len());
        self.state = State::Line;
    }

    /// Where the rest may hold the next delimiter. A longer word that begins like one is none (RFC 2046 lets only white space, a line end
    /// or two dashes follow it).
    fn find_delimiter(&self) -> Found {
        let (rest, delimiter) = (&self.rest[..], &self.delimiter[..]);
        let mut from = 0;
        while let Some(at) = line_end(rest, from) {
            let tail = &rest[at..];
            match tail.strip_prefix(delimiter) {
                Some([] | [b'-']) => return Found::Perhaps(at),
                Some([b'\r' | b' ' | b'\t', ..] | [b'-', b'-', ..]) => return Found::Delimiter(at),
                Some(_) => {}
                None if delimiter.starts_with(tail) => return Found::Perhaps(at),
                None => {}
            }
            from = at + 1;
        }
        Found::Nothing(rest.len())
    }
}

/// Most bytes of a file are looked at here and nowhere else: a slice's `contains` reads words at a time, a search for a position does not.
fn line_end(bytes: &[u8], from: usize) -> Option<usize> {
    const CHUNK: usize = 128;
    let (nth, chunk) = bytes[from..].chunks(CHUNK).enumerate().find(|(_, chunk)| chunk.contains(&b'\r'))?;
    chunk.iter().position(|byte| *byte == b'\r').map(|at| from + nth * CHUNK + at)
}

/// With the count of bytes that are surely before it.
#[derive(Clone, Copy)]
enum Found {
    Delimiter(usize),
    /// More bytes will tell.
    Perhaps(usize),
    Nothing(usize),
}

impl Found {
    fn before(self) -> usize {
        match self {
            Self::Delimiter(before) | Self::Perhaps(before) | Self::Nothing(before) => before,
        }
    }
}

fn part(head: &[u8]) -> Result<Part, Malformed> {
    let head = std::str::from_utf8(head).map_err(|_| Malformed::Head)?;
    let mut disposition = None;
    for line in head.split("\r\n") {
        // A folded line would begin with white space: its name is no token.
        let (name, value) = line.split_once(':').ok_or(Malformed::Head)?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) || value.contains(['\r', '\n', '\0']) {
            return Err(Malformed::Head);
        }
        if name.eq_ignore_ascii_case("content-disposition") && disposition.replace(value.trim()).is_some() {
            return Err(Malformed::Head);
        }
        let plain = ["7bit", "8bit", "binary"].iter().any(|plain| value.trim().eq_ignore_ascii_case(plain));
        if name.eq_ignore_ascii_case("content-transfer-encoding") && !plain {
            return Err(Malformed::Encoded);
        }
    }
    let disposition = disposition.ok_or(Malformed::Nameless)?;
    let (kind, rest) = disposition.split_at(disposition.find(';').unwrap_or(disposition.len()));
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return Err(Malformed::Head);
    }
    let all = parameters(rest).ok_or(Malformed::Head)?;
    let name = value_of(&all, "name").ok_or(Malformed::Nameless)?;
    let file_name = match value_of(&all, "filename*") {
        Some(extended) => Some(of_extended(&extended).ok_or(Malformed::Head)?),
        None => value_of(&all, "filename").map(|name| of_escaped(&name)),
    };
    if name.len() > NAME_BYTES_MAX || file_name.as_ref().is_some_and(|name| name.len() > NAME_BYTES_MAX) {
        return Err(Malformed::LongName);
    }
    Ok(Part { name, file_name })
}

/// `; key=value; key="value"`. `None` when it is something else.
fn parameters(mut text: &str) -> Option<Vec<(String, String)>> {
    const SPACE: [char; 2] = [' ', '\t'];
    let mut all = Vec::new();
    loop {
        text = text.trim_start_matches(SPACE);
        if text.is_empty() {
            return Some(all);
        }
        text = text.strip_prefix(';')?.trim_start_matches(SPACE);
        if text.is_empty() {
            return Some(all);
        }
        let (name, rest) = text.split_once('=')?;
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted)?,
            None => {
                let (value, rest) = rest.split_at(rest.find(';').unwrap_or(rest.len()));
                (value.trim_end_matches(SPACE).to_owned(), rest)
            }
        };
        all.push((name.trim_end_matches(SPACE).to_ascii_lowercase(), value));
        text = rest;
    }
}

fn value_of(all: &[(String, String)], key: &str) -> Option<String> {
    all.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
}

/// The value up to the closing quote, and what follows it. A backslash escapes itself and quotes only: browsers of old sent whole
/// Windows paths.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices().peekable();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((value, &text[at + 1..])),
            '\\' if chars.peek().is_some_and(|(_, next)| matches!(next, '"' | '\\')) => {
                value.extend(chars.next().map(|(_, next)| next));
            }
            _ => value.push(char),
        }
    }
    None
}

/// The three characters that today's clients escape in names (WHATWG HTML, 4.10.21.8), and only those: any other `%` is a name's own.
fn of_escaped(name: &str) -> String {
    name.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n")
}

/// RFC 8187: `UTF-8''na%C3%AFve`
fn of_extended(value: &str) -> Option<String> {
    let (charset, rest) = value.split_once('\'')?;
    let (_language, escaped) = rest.split_once('\'')?;
    if !charset.eq_ignore_ascii_case("utf-8") {
        return None;
    }
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut left = escaped.as_bytes();
    while let [first, rest @ ..] = left {
        left = rest;
        if *first == b'%' {
            let [high, low, rest @ ..] = left else { return None };
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            bytes.push(digit(*high)? << 4 | digit(*low)?);
            left = rest;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Neighbouring contents joined, so that the cut does not show.
    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Event>, Malformed> {
        let mut parser = Parser::new("X");
        let mut events: Vec<Event> = Vec::new();
        for piece in pieces {
            parser.push(Bytes::copy_from_slice(piece));
            while let Some(event) = parser.next()? {
                match (events.last_mut(), event) {
                    (Some(Event::Content(before)), Event::Content(more)) => {
                        *before = [&before[..], &more[..]].concat().into();
                    }
                    (_, event) => events.push(event),
                }
            }
            assert!(parser.rest.len() <= HEAD_BYTES_MAX, "{} bytes are held", parser.rest.len());
        }
        parser.finish().map(|()| events)
    }

    fn file(name: &str, content: &[u8]) -> Vec<u8> {
        let head = format!("--X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
        [head.as_bytes(), content, b"\r\n"].concat()
    }

    fn events_of(name: &str, content: &[u8]) -> Vec<Event> {
        let part = Event::Part(Part { name: "file".into(), file_name: Some(name.into()) });
        let content = (!content.is_empty()).then(|| Event::Content(Bytes::copy_from_slice(content)));
        std::iter::once(part).chain(content).chain([Event::PartEnd]).collect()
    }

    #[test]
    fn parts_are_read() {
        for (body, expected) in [
            ([file("a", b"1"), b"--X--\r\n".to_vec()].concat(), events_of("a", b"1")),
            ([file("a", b""), file("b", b"\r\n--"), b"--X--".to_vec()].concat(), {
                [events_of("a", b""), events_of("b", b"\r\n--")].concat()
            }),
            ([b"a line\r\n".to_vec(), file("a", b"\r\n--XY"), b"--X--".to_vec()].concat(), events_of("a", b"\r\n--XY")),
            (b"--X--".to_vec(), vec![]),
        ] {
            assert_eq!(read([&body[..]]), Ok(expected), "{}", body.escape_ascii());
        }
    }

    #[test]
    fn names_are_what_was_meant() {
        for (sent, meant) in [
            ("filename=\"a b.txt\"", Some("a b.txt")),
            ("filename=plain", Some("plain")),
            ("filename=\"a\\\"b\\\\c\\d\"", Some("a\"b\\c\\d")),
            ("filename=\"%22 100%25\"", Some("\" 100%25")),
            ("filename=\"näme\"", Some("näme")),
            ("filename=\"../../etc/x\"", Some("../../etc/x")),
            ("filename=\"a;b=c\"", Some("a;b=c")),
            ("filename=\"x\"; filename*=UTF-8''n%C3%A4me", Some("näme")),
            ("filename=\"\"", Some("")),
            ("other=1", None),
        ] {
            let head = format!("Content-Type: x/y\r\nCONTENT-disposition: form-data; name=f; {sent}");
            let part = part(head.as_bytes()).unwrap();
            assert_eq!((part.name.as_str(), part.file_name.as_deref()), ("f", meant), "{sent}");
        }
    }

    #[test]
    fn what_is_no_form_is_refused() {
        let head = |head: &str| format!("--X\r\n{head}\r\n\r\nx\r\n--X--").into_bytes();
        let form_data = "Content-Disposition: form-data; name=\"file\"";
        let parts = |count: usize| [file("a", b"").repeat(count), b"--X--".to_vec()].concat();
        for (body, fault) in [
            (b"".to_vec(), Malformed::Preamble),
            (b"hello".to_vec(), Malformed::Preamble),
            (b"--Y--".to_vec(), Malformed::Preamble),
            (vec![b'x'; 1 << 20], Malformed::Preamble),
            (b"\r\n".repeat(1 << 16), Malformed::Preamble),
            (file("a", b"1"), Malformed::CutOff),
            ([file("a", b"1"), b"--X-".to_vec()].concat(), Malformed::CutOff),
            (b"--X\r\n".to_vec(), Malformed::CutOff),
            (b"--X \r\n".to_vec(), Malformed::CutOff),
            (b"--X y\r\n".to_vec(), Malformed::Line),
            ([b"--X".to_vec(), b" ".repeat(100)].concat(), Malformed::Line),
            (b"--X\n\n".to_vec(), Malformed::Preamble),
            (b"--X\r\r\n".to_vec(), Malformed::Line),
            ([b"--X\r\nA: ".to_vec(), vec![b'a'; 1 << 20]].concat(), Malformed::LongHead),
            (head(&format!("{form_data}\r\nA: {}", "a".repeat(HEAD_BYTES_MAX))), Malformed::LongHead),
            (head(&format!("{form_data}; filename=\"{}\"", "a".repeat(NAME_BYTES_MAX + 1))), Malformed::LongName),
            (head("no colon"), Malformed::Head),
            (head("Content-Type: a/b"), Malformed::Nameless),
            (head("Content-Disposition: form-data"), Malformed::Nameless),
            (head("Content-Disposition: attachment; name=\"x\""), Malformed::Head),
            (head("Content-Disposition: form-data; name=\"file"), Malformed::Head),
            (head("Content-Disposition: form-data; name"), Malformed::Head),
            (head(&format!("{form_data}\r\n folded")), Malformed::Head),
            (head(&format!("{form_data}\r\n{form_data}")), Malformed::Head),
            (head(&format!("{form_data}\r\nContent-Transfer-Encoding: base64")), Malformed::Encoded),
            ([b"--X\r\nContent-Disposition: form-data; name=\"\xff\"\r\n\r\n".to_vec()].concat(), Malformed::Head),
            (parts(PARTS_MAX + 1), Malformed::Parts),
            ([parts(1), vec![b'x'; MARGIN_BYTES_MAX + 1]].concat(), Malformed::Epilogue),
        ] {
            let shown = body[..body.len().min(200)].escape_ascii().to_string();
            assert_eq!(read(body.chunks(1000)), Err(fault), "{shown}");
        }
        assert_eq!(read([&parts(PARTS_MAX)[..]]).map(|events| events.len()), Ok(2 * PARTS_MAX));
    }

    #[test]
    fn the_content_type_names_the_boundary() {
        for (kind, usable) in [
            ("multipart/form-data; boundary=abc", Some(true)),
            ("Multipart/Form-Data; charset=utf-8; boundary=\"a b\"", Some(true)),
            ("multipart/form-data", Some(false)),
            ("multipart/form-data; boundary=", Some(false)),
            ("multipart/form-data; boundary=\"\"", Some(false)),
            ("multipart/form-data; boundary=ä", Some(false)),
            ("multipart/mixed; boundary=a", None),
            ("application/octet-stream", None),
            ("", None),
        ] {
            assert_eq!(Parser::of_type(kind).map(|parser| parser.is_ok()), usable, "{kind}");
        }
        assert!(Parser::of_type(&format!("multipart/form-data; boundary={}", "a".repeat(71))).unwrap().is_err());
    }

    /// Mostly the bytes that delimiters and heads are made of.
    fn nasty() -> impl Strategy<Value = Vec<u8>> {
        let words: [&[u8]; 9] = [
            b"\r\n",
            b"\r\n--X",
            b"--",
            b"-",
            b"X",
            b"\r",
            b"--X\r\nContent-Disposition: form-data; name=file\r\n\r\n",
            b" ",
            b"data",
        ];
        let word = proptest::sample::select(words.to_vec());
        proptest::collection::vec(word, 0..40).prop_map(|words| words.concat())
    }

    fn cut<'a>(body: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
        let mut rest = body;
        let mut pieces = Vec::new();
        for length in lengths.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*length).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces
    }

    proptest! {
        #[test]
        fn the_cut_does_not_matter(
            body in prop_oneof![nasty(), proptest::collection::vec(any::<u8>(), 0..300)],
            lengths in proptest::collection::vec(1..20usize, 1..10),
        ) {
            let body = [b"--X\r\nContent-Disposition: form-data; name=file\r\n\r\n".as_slice(), &body].concat();
            prop_assert_eq!(read(cut(&body, &lengths)), read([&body[..]]));
        }

        #[test]
        fn what_is_sent_is_read(
            contents in proptest::collection::vec(nasty(), 0..5),
            lengths in proptest::collection::vec(1..50usize, 1..10),
        ) {
            // A body must not hold its own delimiter: clients choose a boundary of which that is true.
            let contents: Vec<_> = contents
                .into_iter()
                .map(|content| String::from_utf8(content).unwrap().replace('X', "Y").into_bytes())
                .collect();
            let body = contents.iter().map(|content| file("n", content)).chain([b"--X--\r\n".to_vec()]).collect::<Vec<_>>().concat();
            let expected: Vec<Event> = contents.iter().flat_map(|content| events_of("n", content)).collect();
            prop_assert_eq!(read(cut(&body, &lengths)), Ok(expected));
        }
    }
}
