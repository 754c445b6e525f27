"""What a user is shown: one line, and nothing secret in it."""

import pytest

from modelstock.errors import TrackingError, redacted
from modelstock.notices import Notice, collected, notice


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:sesame@host:5000", "http://***@host:5000"),
        ("https://sesame@host/api", "https://***@host/api"),
        ("postgresql+psycopg2://user:ses@me/sesame@host/db", "postgresql+psycopg2://***@host/db"),
        ("s3://KEY:sesame@bucket/path", "s3://***@bucket/path"),
        ("https://host/a?X-Amz-Signature=sesame&b=1", "https://host/a?X-Amz-Signature=***&b=1"),
        ("mysql://host/db?user=me&password=sesame", "mysql://host/db?user=me&password=***"),
        ("azure://c?AccountKey=sesame;x", "azure://c?AccountKey=***"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("wise_ft/0-1@0.25 at http://127.0.0.1:9", "wise_ft/0-1@0.25 at http://127.0.0.1:9"),
    ],
)
def test_what_a_url_carries_as_user_password_or_key_is_not_shown(url, shown):
    assert redacted(f"at {url} now") == f"at {shown} now"


def test_neither_an_error_nor_a_notice_shows_a_password_whatever_part_of_it_has_the_url():
    url = "http://user:sesame@host"
    error = TrackingError(url, got=url, expected=[url], cure=url)
    parts = (str(error), error.place, error.got, error.expected, error.cure)
    assert "sesame" not in str(parts)
    assert parts[0].count("http://***@host") == 4
    with collected() as lines, pytest.warns(Notice):
        notice(url, f"{url} is odd")
    assert lines == ["http://***@host: http://***@host is odd"]
