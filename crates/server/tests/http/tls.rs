//! TLS: who trusts the certificate is served, who does not speak TLS harms nobody.

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use qwenkit_server::{Config, Server, TlsFiles};
use tokio_rustls::rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::client::{config, model, serve_config};

/// A certificate for localhost that nobody else trusts, and its key.
fn files() -> TlsFiles {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/http/tls");
    TlsFiles { certificate: folder.join("certificate.pem"), key: folder.join("key.pem") }
}

#[test]
fn https_is_served_and_plain_http_keeps_nobody_waiting() {
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { tls: Some(files()), ..config });
    // One who never shakes hands, and one who speaks another language.
    let _silent = server.connect();
    let mut plain = server.connect();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(files().certificate).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(client, server.connect());
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    // The end may come without the closing words of TLS.
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"ok\""), "{answer}");
}

#[test]
fn certificates_that_are_none_are_refused_by_name() {
    let wrong = |certificate: PathBuf, key: PathBuf| {
        let tls = Some(TlsFiles { certificate, key });
        Server::bind(&Config { tls, ..config() }, vec![model("qwen2", 256, 1)]).err().unwrap().to_string()
    };
    let TlsFiles { certificate, key } = files();
    assert!(wrong(PathBuf::from("missing.pem"), key.clone()).contains("missing.pem"));
    assert!(wrong(key.clone(), key.clone()).contains("no certificate"));
    assert!(wrong(certificate.clone(), certificate).contains("certificate.pem"));
}
