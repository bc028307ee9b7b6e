//! Compiles the protocol of certificate authorities, without a `protoc` on the machine.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["istio_ca.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Transports are chosen where the protocol is used.
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
