//! Parsing and matching of CIDR blocks.

use std::net::IpAddr;

use super::Cidr;

fn contains(cidr: &str, ip: &str) -> bool {
    let ip: IpAddr = ip.parse().expect("an address");
    Cidr::parse(cidr).expect("a block").contains(ip)
}

#[test]
fn block_contains_the_addresses_of_its_prefix() {
    let table = [
        ("10.0.0.0/8", "10.255.255.255", true),
        ("10.0.0.0/8", "11.0.0.0", false),
        ("10.0.0.0/8", "9.255.255.255", false),
        ("10.1.2.3/32", "10.1.2.3", true),
        ("10.1.2.3/32", "10.1.2.2", false),
        ("0.0.0.0/0", "203.0.113.9", true),
        ("0.0.0.0/0", "255.255.255.255", true),
        ("128.0.0.0/1", "128.0.0.0", true),
        ("128.0.0.0/1", "127.255.255.255", false),
        ("fd00::/8", "fd12::1", true),
        ("fd00::/8", "fe00::1", false),
        ("::/0", "2001:db8::1", true),
        ("::/1", "8000::", false),
        ("fd00::1/128", "fd00::1", true),
        ("fd00::1/128", "fd00::2", false),
    ];
    for (cidr, ip, expected) in table {
        assert_eq!(contains(cidr, ip), expected, "{ip} in {cidr}");
    }
}

#[test]
fn block_contains_no_address_of_the_other_family() {
    assert!(!contains("0.0.0.0/0", "fd00::1"));
    assert!(!contains("::/0", "10.0.0.1"));
    // 0.0.0.1 and ::1 are the same number.
    assert!(!contains("::/96", "0.0.0.1"));
}

#[test]
fn host_bits_are_ignored() {
    assert_eq!(Cidr::parse("10.1.2.3/8"), Cidr::parse("10.0.0.0/8"));
    assert_eq!(
        Cidr::parse("10.1.2.3/8").expect("a block").to_string(),
        "10.0.0.0/8"
    );
    assert_eq!(
        Cidr::parse("fd00::1/8").expect("a block").to_string(),
        "fd00::/8"
    );
}

#[test]
fn invalid_blocks_are_rejected() {
    let table = [
        "",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "10.0.0.0/08",
        "10.0.0.0/ 8",
        "10.0.0.0/8 ",
        " 10.0.0.0/8",
        "10.0.0/8",
        "010.0.0.0/8",
        "10.0.0.0/8/8",
        "10.0.0.0/99999999999999999999",
        "10.0.0.0/255.0.0.0",
        "fd00::/129",
        "fd00::%eth0/8",
        "[fd00::]/8",
        "::ffff:10.0.0.0/104",
        "example.com/8",
        "0.0.0.0/0,10.0.0.0/8",
    ];
    for text in table {
        assert!(Cidr::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn strictly_contained_block_is_smaller_and_inside() {
    let table = [
        ("10.0.0.0/8", "10.1.0.0/16", true),
        ("10.0.0.0/8", "10.0.0.0/8", false),
        ("10.0.0.0/8", "10.0.0.0/7", false),
        ("10.0.0.0/8", "11.0.0.0/16", false),
        ("0.0.0.0/0", "10.0.0.0/8", true),
        ("::/0", "10.0.0.0/8", false),
        ("0.0.0.0/0", "fd00::/8", false),
    ];
    for (block, except, expected) in table {
        let [block, except] = [block, except].map(|text| Cidr::parse(text).expect("a block"));
        assert_eq!(
            block.strictly_contains(&except),
            expected,
            "{except} in {block}"
        );
    }
}
