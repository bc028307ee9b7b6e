//! Compiles Istio's CSR protocol with protox, so that the build needs no `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["istio_ca.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // The users of the generated code choose the transport.
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
