//! QUIC through a forwarder: a client and a server of a real library, ten megabytes both ways at once, and a client that moves to another
//! port in between.
//!
//! Needs: a network namespace. Takes: seconds.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::require_namespaces;
use bro_tests::udp::UdpScene;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use quinn::rustls::crypto::{CryptoProvider, ring};
use quinn::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use quinn::rustls::server::{ClientHello, ResolvesServerCert};
use quinn::rustls::sign::{CertifiedKey, Signer, SigningKey};
use quinn::rustls::{
    ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureAlgorithm, SignatureScheme, version,
};
use quinn::{Connection, Endpoint, EndpointConfig, TokioRuntime};

/// Each way.
const BULK: usize = 10 << 20;

/// Long enough for all of it, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Stands for a server's identity, on both sides: none has one here. What is encrypted and acknowledged is so all the same.
#[derive(Debug)]
struct NoIdentity(Arc<CryptoProvider>);

const SCHEME: SignatureScheme = SignatureScheme::ED25519;

impl SigningKey for NoIdentity {
    fn choose_scheme(&self, _offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        Some(Box::new(Self(self.0.clone())))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for NoIdentity {
    fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(vec![0; 64])
    }

    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

impl ResolvesServerCert for NoIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let key = Arc::new(Self(self.0.clone()));
        Some(Arc::new(CertifiedKey::new(vec![CertificateDer::from(vec![0])], key)))
    }
}

impl ServerCertVerifier for NoIdentity {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SCHEME]
    }
}

fn server(socket: UdpSocket, provider: Arc<CryptoProvider>) -> Result<Endpoint> {
    let tls = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(NoIdentity(provider)));
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    Ok(Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))?)
}

fn client(provider: Arc<CryptoProvider>) -> Result<Endpoint> {
    let tls = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NoIdentity(provider)))
        .with_no_client_auth();
    let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
    Ok(endpoint)
}

fn bulk(seed: usize) -> Vec<u8> {
    (0..BULK).map(|at| (at * 31 + at / 251 + seed) as u8).collect()
}

/// Sends and receives all of it at once, over a stream of its own.
async fn exchange(connection: &Connection, seed: usize) -> Result<()> {
    let (mut send, mut receive) = connection.open_bi().await?;
    let sent = bulk(seed);
    let sending = async {
        send.write_all(&sent).await?;
        anyhow::Ok(send.finish()?)
    };
    let receiving = async { Ok(receive.read_to_end(BULK).await?) };
    let ((), came) = tokio::try_join!(sending, receiving)?;
    ensure!(came == sent, "{} bytes came back, or others", came.len());
    Ok(())
}

/// Sends back what comes, while it comes; tells from where the client came each time.
async fn serve(endpoint: Endpoint, seen: tokio::sync::mpsc::UnboundedSender<SocketAddr>) -> Result<()> {
    let connection = endpoint.accept().await.context("no client")?.await?;
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        while let Some(chunk) = receive.read_chunk(1 << 16, true).await? {
            send.write_chunk(chunk.bytes).await?;
        }
        send.finish()?;
        seen.send(connection.remote_address()).ok();
    }
    Ok(())
}

#[test]
fn ten_megabytes_both_ways_and_a_client_that_moves() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let service = scene.service()?;
    let forwarder = scene.setup()?.start()?;
    let front = scene.address()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let story = async {
        let provider = Arc::new(ring::default_provider());
        let (seen, mut clients) = tokio::sync::mpsc::unbounded_channel();
        let serving = tokio::spawn(serve(server(service, provider.clone())?, seen));
        let endpoint = client(provider)?;
        let connection = endpoint.connect(front, "localhost")?.await.context("the handshake")?;
        exchange(&connection, 1).await.context("ten megabytes each way")?;
        let before = clients.recv().await.context("the server has ended")?;
        // As a phone that goes from one network to another, or a client behind a router that has forgotten it.
        endpoint.rebind(UdpSocket::bind("127.0.0.1:0")?)?;
        exchange(&connection, 2).await.context("after the client has moved")?;
        let after = clients.recv().await.context("the server has ended")?;
        ensure!(before != after, "the server sees the client where it was: {before}");
        connection.close(0u32.into(), b"done");
        endpoint.wait_idle().await;
        serving.await?
    };
    runtime.block_on(async { tokio::time::timeout(LIMIT, story).await.context("it takes too long")? })?;
    let tally = forwarder.report()?.total.datagrams;
    ensure!(tally.flows == 2 && tally.to_service.bytes > 2 * BULK as u64, "{tally:?}");
    ensure!(tally.to_clients.bytes > 2 * BULK as u64, "{tally:?}");
    forwarder.expect_no_panic()
}
