//! Which public key does a certificate signing request ask to certify?

use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_NIST_EC_P384};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

use super::refusal::Refusal;

/// A request with a key of RSA 4096 has two kilobytes.
const MAX_CSR_BYTES: usize = 16 * 1024;
/// Shorter keys can be broken within the lifetime of a certificate; signatures of longer ones cost
/// every verifier more than they are worth.
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 4096;

/// The public key of a request in PEM. Names, usages and all other content of the request are
/// ignored.
///
/// # Errors
/// Refuses requests that are malformed, not signed with their own key, or whose key is neither P-256,
/// P-384 nor RSA of 2048 to 4096 bits.
pub(super) fn public_key(csr: &str) -> Result<SubjectPublicKeyInfo, Refusal> {
    let malformed = |message: &str| Refusal::invalid("csr_malformed", message);
    if csr.len() > MAX_CSR_BYTES {
        return Err(malformed("the certificate signing request is too large"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .map_err(|_| malformed("not a certificate signing request in PEM"))?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der)
        .map_err(|_| malformed("the certificate signing request cannot be parsed"))?;
    if !rest.is_empty() {
        return Err(malformed(
            "there is data after the certificate signing request",
        ));
    }
    let key = &parsed.certification_request_info.subject_pki;
    // Checked before the signature, whose verification takes longer with larger keys.
    check_key(key)?;
    parsed.verify_signature().map_err(|_| {
        let message = "the request is not signed with the key in it";
        Refusal::invalid("csr_signature", message)
    })?;
    SubjectPublicKeyInfo::from_der(key.raw)
        .map_err(|_| Refusal::invalid("csr_key", "keys of this kind are not certified"))
}

fn check_key(key: &ParsedKey<'_>) -> Result<(), Refusal> {
    let refused = |message: String| Err(Refusal::invalid("csr_key", message));
    match key.parsed() {
        Ok(PublicKey::EC(_)) => {
            let parameters = key.algorithm.parameters.as_ref();
            let curve = parameters.and_then(|parameters| parameters.as_oid().ok());
            if curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384) {
                return Ok(());
            }
            refused("the curve of the key is neither P-256 nor P-384".to_owned())
        }
        Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
            MIN_RSA_BITS..=MAX_RSA_BITS => Ok(()),
            bits => refused(format!(
                "an RSA key of {bits} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are certified"
            )),
        },
        _ => refused("the key is neither P-256, P-384 nor RSA".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256,
        PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData, RsaKeySize,
        SignatureAlgorithm,
    };

    use super::*;

    fn csr(key: &KeyPair) -> String {
        let params = CertificateParams::default();
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn key_pair(algorithm: &'static SignatureAlgorithm) -> KeyPair {
        KeyPair::generate_for(algorithm).unwrap()
    }

    #[test]
    fn only_the_public_key_of_a_request_is_used() {
        let p256 = key_pair(&PKCS_ECDSA_P256_SHA256);
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, "evil.example");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let greedy = params.serialize_request(&p256).unwrap().pem().unwrap();
        assert_eq!(public_key(&greedy).unwrap().der_bytes(), p256.der_bytes());
        for key in [
            key_pair(&PKCS_ECDSA_P384_SHA384),
            KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap(),
        ] {
            let certified = public_key(&csr(&key)).unwrap();
            assert_eq!(certified.der_bytes(), key.der_bytes());
        }
    }

    #[test]
    fn keys_of_other_kinds_are_refused() {
        let refused = public_key(&csr(&key_pair(&PKCS_ED25519))).unwrap_err();
        assert_eq!(refused.reason, "csr_key");
    }

    #[test]
    fn request_with_an_invalid_signature_is_refused() {
        let pem = csr(&key_pair(&PKCS_ECDSA_P256_SHA256));
        let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .unwrap()
            .to_vec();
        // The signature is the last part.
        *der.last_mut().unwrap() ^= 1;
        let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
        assert_eq!(public_key(&forged).unwrap_err().reason, "csr_signature");
    }

    #[test]
    fn malformed_requests_of_any_size_are_refused() {
        let valid = csr(&key_pair(&PKCS_ECDSA_P256_SHA256));
        for malformed in [
            "",
            "garbage",
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            &valid.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            &valid[..valid.len() / 2],
            &"x".repeat(1 << 20),
        ] {
            assert_eq!(public_key(malformed).unwrap_err().reason, "csr_malformed");
        }
    }
}
