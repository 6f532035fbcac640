//! The mock provider: an OpenAI-compatible answer of 200 one-character chunks, a write each, as fast as they go or with
//! a gap after each. It costs next to nothing, so that what is measured is what stands before it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// Text chunks in an answer.
pub const CHUNKS: usize = 200;

const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Serves on `port` of the loopback interface until the process ends.
pub fn start(port: u16, gap: Duration) -> std::io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let answer = Arc::new(answer());
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            // A client that leaves ends its thread, which is all there is to do about it.
            std::thread::spawn(move || serve(socket, &answer, gap));
        }
    });
    Ok(())
}

fn serve(mut socket: TcpStream, answer: &[Vec<u8>], gap: Duration) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut requests = BufReader::new(socket.try_clone()?);
    while read_request(&mut requests)? {
        for piece in answer {
            socket.write_all(piece)?;
            if !gap.is_zero() {
                std::thread::sleep(gap);
            }
        }
    }
    Ok(())
}

/// Reads a request to its end and forgets it; false when there is none any more.
fn read_request(from: &mut impl BufRead) -> std::io::Result<bool> {
    let (mut length, mut chunked) = (0, false);
    for at in 0.. {
        let line = read_line(from)?;
        match (at, line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value))) {
            (0, _) if line.is_empty() => return Ok(false),
            (_, Some((name, value))) if name == "content-length" => length = value.parse().unwrap_or(0),
            (_, Some((name, value))) if name == "transfer-encoding" => chunked = value == "chunked",
            _ if line.is_empty() => break,
            _ => {}
        }
    }
    let mut skip = |bytes: u64| std::io::copy(&mut from.take(bytes), &mut std::io::sink());
    skip(length)?;
    while chunked {
        let size = u64::from_str_radix(&read_line(from)?, 16).unwrap_or(0);
        std::io::copy(&mut from.take(size + 2), &mut std::io::sink())?;
        chunked = size > 0;
    }
    Ok(true)
}

fn read_line(from: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// The answer as pieces, each an HTTP chunk of one event.
fn answer() -> Vec<Vec<u8>> {
    let event = |rest: String| {
        let head = "\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"bench\"";
        format!("data: {{{head},{rest}}}\n\n")
    };
    let delta = |text: char| event(format!(r#""choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}]"#));
    let text = "夜雨落在青石巷里，她把灯芯挑亮，写下第一个字。".chars().cycle().take(CHUNKS);
    let usage = format!(r#"{{"prompt_tokens":20,"completion_tokens":{CHUNKS},"total_tokens":{}}}"#, CHUNKS + 20);
    let end = [
        event(r#""choices":[{"index":0,"delta":{},"finish_reason":"stop"}]"#.to_owned()),
        event(format!(r#""choices":[],"usage":{usage}"#)),
        "data: [DONE]\n\n".to_owned(),
    ];
    let pieces = text.map(delta).chain(end).map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len()).into_bytes());
    std::iter::once(HEAD.into()).chain(pieces).chain(["0\r\n\r\n".into()]).collect()
}
