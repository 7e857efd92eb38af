//! Relays of one's own: what a node asks of them, and which certificates it believes.
//!
//! A relay also tells a node under which address it is seen from outside (QUIC address discovery), without which two
//! nodes behind NATs rarely come to a direct connection. QUIC is never without a certificate. A relay that is named with
//! `https://` shows the one that it has for that name, at iroh's port. A relay that is named with `http://` has none: it
//! answers at the UDP port of the same number, with a certificate that it signed itself, and is believed what it says,
//! as over plain HTTP. Who stands in between can do no more harm than he can by losing packets: the address that is told
//! is only tried, and what goes between nodes is encrypted end to end with their own keys.

use std::collections::BTreeSet;
use std::sync::Arc;

use iroh::{RelayConfig, RelayMap, RelayUrl};
use iroh_relay::RelayQuicConfig;
use iroh_relay::tls::CaTlsConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, ServerConfig, SignatureScheme};

use crate::NetError;
use crate::endpoint::causes;

/// Whom to ask, and at which port for the outer address.
pub(crate) fn relay_map(urls: &[RelayUrl]) -> RelayMap {
    urls.iter().map(|url| RelayConfig::new(url.clone(), Some(address_discovery(url)))).collect()
}

fn address_discovery(url: &RelayUrl) -> RelayQuicConfig {
    match url.port_or_known_default() {
        Some(port) if is_plain(url) => RelayQuicConfig::new(port),
        _ => RelayQuicConfig::default(),
    }
}

fn is_plain(url: &RelayUrl) -> bool {
    url.scheme() == "http"
}

/// Believes what the world's certificate authorities vouch for, and any certificate of hosts that are named with
/// `http://` alone.
pub(crate) fn certificates(urls: &[RelayUrl]) -> CaTlsConfig {
    let hosts = |plain: bool| urls.iter().filter(move |url| is_plain(url) == plain).filter_map(|url| url.host_str());
    let vouched: BTreeSet<&str> = hosts(false).collect();
    let unvouched: Arc<[ServerName<'static>]> =
        hosts(true).filter(|host| !vouched.contains(host)).filter_map(server_name).collect();
    CaTlsConfig::custom_server_cert_verifier(Arc::new(move |provider: Arc<CryptoProvider>| {
        let usual = CaTlsConfig::default().server_cert_verifier(provider)?;
        Ok(Arc::new(Verifier { usual, unvouched: unvouched.clone() }))
    }))
}

/// A host of a URL, in which IPv6 addresses stand in brackets.
fn server_name(host: &str) -> Option<ServerName<'static>> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).ok()
}

#[derive(Debug)]
struct Verifier {
    usual: Arc<dyn ServerCertVerifier>,
    unvouched: Arc<[ServerName<'static>]>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.unvouched.contains(server_name) {
            return Ok(ServerCertVerified::assertion());
        }
        self.usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// TLS of a relay without a name of its own: a fresh key, and a certificate that nobody but itself vouches for.
///
/// # Errors
/// [`NetError::Start`], if there is no randomness, say.
pub(crate) fn self_signed() -> Result<ServerConfig, NetError> {
    let failed = |error: &dyn std::error::Error| NetError::Start { what: "relay", reason: causes(error) };
    // Nobody looks at the name.
    let made = rcgen::generate_simple_self_signed(["murmur-seed".to_owned()]).map_err(|error| failed(&error))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    ServerConfig::builder_with_provider(iroh_relay::tls::default_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![made.cert.into()], key.into()))
        .map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a node that uses these relays makes of a certificate that nobody vouches for.
    fn believes(relays: &[&str], host: &str) -> bool {
        let urls: Vec<RelayUrl> = relays.iter().map(|url| url.parse().unwrap()).collect();
        let verifier = certificates(&urls).server_cert_verifier(iroh_relay::tls::default_provider()).unwrap();
        let certificate = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap().cert.into();
        verifier.verify_server_cert(&certificate, &[], &server_name(host).unwrap(), &[], UnixTime::now()).is_ok()
    }

    #[test]
    fn a_certificate_that_nobody_vouches_for_counts_at_hosts_that_are_named_without_tls_alone() {
        let relays = ["http://10.0.0.1:6879", "http://[fd00::1]:6879", "http://seed.example:80"];
        for host in ["10.0.0.1", "fd00::1", "seed.example"] {
            assert!(believes(&relays, host), "{host}");
        }
        assert!(!believes(&relays, "10.0.0.2") && !believes(&relays, "example"));
        assert!(!believes(&["https://seed.example"], "seed.example"));
        assert!(!believes(&["https://seed.example", "http://seed.example"], "seed.example"));
    }

    #[test]
    fn a_relay_without_tls_is_asked_at_its_own_port() {
        let port = |url: &str| address_discovery(&url.parse().unwrap()).port;
        assert_eq!((port("http://10.0.0.1:6879"), port("http://seed.example")), (6879, 80));
        assert_eq!(port("https://seed.example:444"), iroh_relay::defaults::DEFAULT_RELAY_QUIC_PORT);
    }
}
