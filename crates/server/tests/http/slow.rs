//! Clients that are slow, and more of them than there is room for: they lose their connections, and nobody else waits.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use qwenkit_server::{Config, Limits};

use crate::client::{Reply, Running, model, serve_config};

/// A server that does not wait long, with room for so many connections.
fn impatient(connections: u32) -> Running {
    let patience = Duration::from_millis(300);
    let limits = Limits { body_bytes: 64 << 20, connections, patience, ..Limits::default() };
    serve_config(vec![model("qwen2", 2048, 64)], |config| Config { limits, ..config })
}

/// What a server says until it closes the connection.
fn rest(mut stream: TcpStream) -> String {
    let mut told = Vec::new();
    // A reset is an end too.
    let _ = stream.read_to_end(&mut told);
    String::from_utf8(told).unwrap()
}

#[test]
fn heads_and_bodies_have_to_come_in_time() {
    let server = impatient(16);
    for begun in ["", "POST /v1/emb", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-slow: "] {
        let mut stream = server.connect();
        stream.write_all(begun.as_bytes()).unwrap();
        let told = rest(stream);
        assert!(!told.contains("200"), "{begun:?}: {told}");
    }
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{").unwrap();
    let told = rest(stream);
    assert!(told.starts_with("HTTP/1.1 408") && told.contains("did not arrive within 0.3 s"), "{told}");
}

#[test]
fn whoever_takes_nothing_makes_room_for_others() {
    let server = impatient(1);
    // More than the system keeps for a connection.
    let large = "x".repeat(48 << 20);
    let file = server.upload("", "user_data", &large).ok();
    let path = format!("/v1/files/{}/content", file["id"].as_str().unwrap());
    let stuck = server.send("GET", &path, "", b"");
    // There is room for one, so this is answered when the other one is gone.
    assert_eq!(server.get("/health").status, 200);
    let taken = rest_bytes(stuck);
    assert!(taken < large.len(), "the file was cut off, {taken} bytes came");
}

fn rest_bytes(mut stream: TcpStream) -> usize {
    let (mut bytes, mut piece) = (0, vec![0; 1 << 16]);
    while let Ok(n @ 1..) = stream.read(&mut piece) {
        bytes += n;
    }
    bytes
}

#[test]
fn connections_beyond_the_most_wait_for_their_turn() {
    let server = impatient(2);
    let idle: Vec<TcpStream> = (0..6).map(|_| server.connect()).collect();
    // Behind all of them, which are closed two by two.
    assert_eq!(Reply::read(server.send("GET", "/health", "", b"")).status, 200);
    drop(idle);
}
