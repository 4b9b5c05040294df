//! Compressed bodies of `/files`, a piece at a time: what a few bytes unpack to never lies in memory as a whole.

use std::io::{self, Write as _};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzDecoder, GzEncoder};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _};
use http::HeaderMap;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};

/// How the body of an upload is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upload {
    Plain,
    Gzip,
}

/// An error is a text for the caller.
pub fn of_upload(headers: &HeaderMap) -> Result<Upload, &'static str> {
    let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
    match (encodings.next().map(|value| value.as_bytes().to_ascii_lowercase()).as_deref(), encodings.next()) {
        (None | Some(b"" | b"identity"), None) => Ok(Upload::Plain),
        (Some(b"gzip"), None) => Ok(Upload::Gzip),
        _ => Err("Content-Encoding must be identity or gzip"),
    }
}

impl Upload {
    pub fn pieces<'a, E: std::error::Error + Send + Sync + 'static>(
        self,
        body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'a,
    ) -> BoxStream<'a, io::Result<Bytes>> {
        let body = body.map(|piece| piece.map_err(io::Error::other));
        if self == Self::Plain {
            return body.boxed();
        }
        let unpacking = Unpacking { body, packed: Bytes::new(), decoder: GzDecoder::new(Vec::new()), over: false };
        stream::try_unfold(unpacking, |mut unpacking| async move {
            Ok(unpacking.next().await?.map(|piece| (piece, unpacking)))
        })
        .boxed()
    }
}

struct Unpacking<S> {
    body: S,
    packed: Bytes,
    decoder: GzDecoder<Vec<u8>>,
    over: bool,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Unpacking<S> {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            // One `write` unpacks at most the decoder's buffer (32 KiB), however small the packed bytes are.
            let unpacked = std::mem::take(self.decoder.get_mut());
            if !unpacked.is_empty() {
                return Ok(Some(unpacked.into()));
            }
            if self.over {
                return Ok(None);
            }
            if self.packed.is_empty() {
                match self.body.next().await {
                    Some(piece) => self.packed = piece?,
                    None => {
                        // Complains when the end, or the sum of what came before, is missing or wrong.
                        self.decoder.try_finish()?;
                        self.over = true;
                    }
                }
                continue;
            }
            let taken = self.decoder.write(&self.packed)?;
            if taken == 0 && self.decoder.get_ref().is_empty() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes after the end of the gzip data"));
            }
            let _ = self.packed.split_to(taken);
        }
    }
}

/// How a download is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Download {
    Plain,
    Gzip,
    /// Nothing that the client takes is there.
    Neither,
}

/// Packed only for a client that asks for gzip and nothing else: HTTP libraries offer it along with others whatever they fetch, and the
/// guest's one CPU has better things to do.
pub fn of_download(headers: &HeaderMap) -> Download {
    let mut gzip = None;
    let mut identity = None;
    let mut others = false;
    for coding in
        headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).flat_map(|it| it.split(','))
    {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let taken = weight.trim().strip_prefix("q=").is_none_or(|q| q.trim().parse::<f32>().is_ok_and(|q| q > 0.0));
        match name.trim().to_ascii_lowercase().as_str() {
            "" => {}
            "gzip" => gzip = Some(taken),
            "identity" => identity = Some(taken),
            "*" => {
                gzip = gzip.or(Some(taken));
                identity = identity.or(Some(taken));
            }
            _ => others |= taken,
        }
    }
    match (gzip, identity) {
        (Some(true), Some(false)) => Download::Gzip,
        (Some(true), None) if !others => Download::Gzip,
        (_, Some(false)) => Download::Neither,
        _ => Download::Plain,
    }
}

/// Packs a stream of pieces, a piece at a time.
pub fn pack<E>(
    pieces: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> BoxStream<'static, Result<Bytes, E>>
where
    E: From<io::Error> + Send + 'static,
{
    let encoder = Some(GzEncoder::new(Vec::new(), Compression::fast()));
    stream::try_unfold((pieces, encoder), |(mut pieces, mut encoder)| async move {
        loop {
            let Some(mut packing) = encoder.take() else { return Ok(None) };
            let packed = match pieces.next().await {
                None => packing.finish()?,
                Some(piece) => {
                    packing.write_all(&piece?)?;
                    let packed = std::mem::take(packing.get_mut());
                    encoder = Some(packing);
                    packed
                }
            };
            if !packed.is_empty() {
                return Ok(Some((Bytes::from(packed), (pieces, encoder))));
            }
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    fn headers(name: http::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, http::HeaderValue::from_static(value))])
    }

    #[test]
    fn only_who_asks_for_gzip_alone_gets_it() {
        for (asked, given) in [
            ("", Download::Plain),
            ("gzip", Download::Gzip),
            ("GZIP;q=0.5", Download::Gzip),
            ("gzip;q=0", Download::Plain),
            ("gzip, deflate, br, zstd", Download::Plain),
            ("identity", Download::Plain),
            ("gzip, identity;q=0", Download::Gzip),
            ("br, gzip, identity;q=0", Download::Gzip),
            ("identity;q=0", Download::Neither),
            ("br, identity;q=0", Download::Neither),
            ("*;q=0", Download::Neither),
            ("br, *", Download::Plain),
        ] {
            assert_eq!(of_download(&headers(ACCEPT_ENCODING, asked)), given, "{asked}");
        }
        for (sent, read) in [("gzip", Ok(Upload::Gzip)), ("identity", Ok(Upload::Plain)), ("br", Err(()))] {
            assert_eq!(of_upload(&headers(CONTENT_ENCODING, sent)).map_err(drop), read);
        }
    }

    async fn unpack(packed: Vec<Bytes>) -> io::Result<Vec<Bytes>> {
        Upload::Gzip.pieces(stream::iter(packed.into_iter().map(io::Result::Ok))).try_collect().await
    }

    #[tokio::test]
    async fn what_is_packed_unpacks_in_bounded_pieces() {
        // Zeros pack a thousandfold.
        let plain = vec![0u8; 8 << 20];
        let pieces: Vec<_> = plain.chunks(100_000).map(|piece| io::Result::Ok(Bytes::copy_from_slice(piece))).collect();
        let packed: Vec<Bytes> = pack(stream::iter(pieces)).try_collect().await.unwrap();
        assert!(packed.iter().map(Bytes::len).sum::<usize>() < plain.len() / 100);
        let unpacked = unpack(packed.clone()).await.unwrap();
        assert!(unpacked.iter().all(|piece| piece.len() <= 256 * 1024), "{:?}", unpacked.iter().map(Bytes::len).max());
        assert!(unpacked.concat() == plain);

        let whole = packed.concat();
        for cut in [1, 5, whole.len() / 2, whole.len() - 1] {
            assert!(unpack(vec![Bytes::copy_from_slice(&whole[..cut])]).await.is_err(), "cut at {cut}");
        }
        let mut damaged = whole.clone();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        assert!(unpack(vec![damaged.into()]).await.is_err());
        let more = [whole.as_slice(), b"more"].concat();
        assert!(unpack(vec![more.into()]).await.is_err());
        assert!(unpack(vec![Bytes::from_static(b"no gzip")]).await.is_err());
    }
}
