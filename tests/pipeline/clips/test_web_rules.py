"""What the web may ask of us and show us: addresses, robots.txt, opt-out headers, pages."""

import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clips.fetch.answers import Robots, opted_out
from pipeline.clips.fetch.guarded import is_public
from pipeline.clips.sources.page import parse_page


@given(st.ip_addresses())
def test_only_global_unicast_is_public(address):
    if is_public(address):
        assert address.is_global
        assert not (address.is_private or address.is_loopback or address.is_link_local or address.is_multicast)


@given(st.ip_addresses(v=4))
def test_wrapping_an_address_in_ipv6_makes_nothing_public(address):
    def wrap(prefix: str, shift_bits: int = 0) -> ipaddress.IPv6Address:
        return ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + (int(address) << shift_bits))

    for wrapped in (wrap("::ffff:0:0"), wrap("64:ff9b::"), wrap("2002::", 80), wrap("2606:4700::5efe:0:0")):
        assert is_public(wrapped) == is_public(address)
    for prefix in ("::", "::ffff:0:0:0", "64:ff9b:1::", "fec0::", "2001::"):  # the last is Teredo
        assert not is_public(wrap(prefix))


@pytest.mark.parametrize(
    "text", ["::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1", "64:ff9b:1::a00:1", "::1", "::"]
)
def test_addresses_that_lead_inward_are_not_public(text):
    assert not is_public(ipaddress.ip_address(text))


def test_robots_rules_follow_rfc_9309():
    lines = ["User-agent: a", "User-agent: vimi-crawler", "Disallow: /x", "Allow: /x/y", "Disallow: /*.gif$"]
    text = "\n".join([*lines, "Crawl-delay: 2", "", "User-agent: *", "Disallow: /"])
    ours = Robots(text, "vimi-crawler/0.1")
    assert [ours.allows(p) for p in ("/", "/x", "/x/y/z", "/a.gif", "/a.gif?b")] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert ours.crawl_delay_s == 2
    assert not Robots(text, "other").allows("/")
    assert Robots("", "other").allows("/")


@given(st.text(), st.text())
def test_no_robots_file_can_crash_the_crawler(text, path):
    assert Robots(text, "x").allows(path) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "User-agent: *\nDisallow: /*a*a*a*a*a*a*a*ab$",
        "User-agent: *\n" + "Disallow: /*a*a*a*ab$\n" * 20_000,
        "".join(f"User-agent: bot{n}\n" for n in range(16_000)) + "Disallow: /x\n" * 16_000,
    ],
    ids=["wildcards", "many rules", "many agents"],
)
def test_no_robots_file_costs_more_than_linear_time(text):
    started_s = time.process_time()
    assert Robots(text, "vimi-crawler/0.1").allows("/" + "a" * 2000)
    assert time.process_time() - started_s < 10


def test_opt_out_headers_name_everyone_or_us():
    assert opted_out(["noindex, NoAI"], "vimi-crawler/0.1") == "noai"
    assert opted_out(["vimi-crawler: noimageai"], "vimi-crawler/0.1") == "noimageai"
    assert opted_out(["otherbot: noai"], "vimi-crawler/0.1") is None
    assert opted_out(["noindex"], "vimi-crawler/0.1") is None


def test_pages_give_their_media_with_the_words_beside_them():
    html = b"""<html><head><title>Title</title><meta property="og:video" content="/og.mp4">
    <meta property="og:title" content="The film"></head><body>
    <video title="a clip"><source src="v.webm"><source src="v.mp4"></video>
    <figure><img src="/f.jpg" alt="alt"><figcaption>The <b>figure</b>'s words</figcaption></figure>
    <img src="http://other.org/i.png" alt=" an  icon "><img src="data:image/png;base64,x">
    <a href="sub/page.html#part">link</a></body></html>"""
    page = parse_page("http://site.org/a/index.html", html)
    assert [(item.uri, item.media, item.cuts[0].caption) for item in page.items] == [
        ("http://site.org/a/v.webm", "video", "a clip"),
        ("http://site.org/a/v.mp4", "video", "a clip"),
        ("http://site.org/f.jpg", "image", "The figure's words"),
        ("http://other.org/i.png", "image", "an icon"),
        ("http://site.org/og.mp4", "video", "The film"),
    ]
    assert page.links == ["http://site.org/a/sub/page.html"]


@given(st.binary(max_size=300))
def test_no_page_can_crash_the_crawler(body):
    parse_page("http://site.org/", b"<figure><video src=a>" + body)


@pytest.mark.parametrize(
    "body",
    [
        b"<a href='http://[IPv6 address]/'>x</a>",
        b"<img src='http://[x'>",
        b"<base href='http://['>",
        b"<![<![",
        b"<figure><video></figure></video></figure>",
        b"<img src='/" + b"x" * 5000 + b"'>",
        b"<title>&#" + b"9" * 6000 + b";</title>",
    ],
)
def test_what_is_no_address_on_a_page_is_passed_over(body):
    page = parse_page("http://site.org/", b"<video src='good.mp4'></video>" + body)
    assert [item.uri for item in page.items] == ["http://site.org/good.mp4"]


@pytest.mark.parametrize(
    "piece",
    [
        *(
            b"<video src=a>",
            b"<a href=x>",
            b"<!",
            b"<!--",
            b"<a ",
            b"<a href='",
            b"</a",
            b"<",
            b"&",
            b"<title>x",
            b"<a x=",
        ),
        *(b"<figure><img src=x><figcaption>y", b"<figcaption>x<b>", b"<a =", b"<script>", b"<![", b"<?"),
    ],
    ids=repr,
)
def test_no_page_costs_more_than_linear_time(piece):
    body = piece * (350_000 // len(piece))
    started_s = time.process_time()
    parse_page("http://site.org/", body)
    assert time.process_time() - started_s < 5  # a square would take hundreds


def test_a_page_gives_so_many_videos_and_links_and_counts_the_rest():
    page = parse_page("http://site.org/", b"<video src=a>" * 50_000 + b"<a href=x>" * 30_000)
    assert (len(page.items), len(page.links), page.num_left_out) == (10_000, 10_000, 60_000)


def test_a_page_is_read_as_browsers_do():
    body = (
        b"<script>if (a < b) '<img src=no.jpg>'</script><!-- <img src=no2.jpg> --><TITLE>A &amp; <b>B</TITLE>"
        b"<IMG alt=plain SRC=1.jpg><img src='2.jpg' alt='it&#39;s > that'/><video src = \"v.mp4\" ></video>"
        b"<img src='http://me:secret@other.org/3.jpg' alt=x>< img src=no3.jpg><img src=end.jpg"
    )
    found = [(item.uri, item.cuts[0].caption) for item in parse_page("http://site.org/", body).items]
    assert found == [
        ("http://site.org/1.jpg", "plain"),
        ("http://site.org/2.jpg", "it's > that"),
        ("http://site.org/v.mp4", "A & <b>B"),
        ("http://other.org/3.jpg", "x"),
    ]
