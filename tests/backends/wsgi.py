"""WSGI applications, served by gunicorn: `gunicorn tests.backends.wsgi:bottle_app`. Imported as asked for."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from tests.backends.report import PATHS, executed


def bottle_app() -> Any:
    """Bottle as it comes; with version 0.12 on PYTHONPATH, that one."""
    import bottle

    app = bottle.Bottle()
    for path in PATHS:
        app.post(path, callback=lambda: executed(bottle.request.headers, bottle.request.body.read()))
    return app


def flask_app() -> Any:
    """Flask that takes a trailing slash and merges slashes."""
    import flask

    app = flask.Flask("backend")
    app.url_map.strict_slashes = False
    for number, path in enumerate(PATHS):
        app.add_url_rule(
            path,
            f"execute{number}",
            lambda: executed(flask.request.headers, flask.request.get_data()),
            methods=["POST"],
        )
    return app


def flask_url_app() -> Any:
    """Flask behind ProxyFix, which dispatches on the path of the URL that it has built again."""
    import flask
    from werkzeug.middleware.proxy_fix import ProxyFix

    app = flask.Flask("backend")

    @app.route("/", defaults={"path": ""}, methods=["POST"])
    @app.route("/<path:path>", methods=["POST"])
    def any_path(path: str) -> str:
        del path
        if urlsplit(flask.request.url).path in PATHS:
            return executed(flask.request.headers, flask.request.get_data())
        return "another path"

    # Flask's documented way to wrap an application, which its types do not allow.
    app.wsgi_app = ProxyFix(app.wsgi_app, x_host=1, x_proto=1, x_prefix=1)  # type: ignore[method-assign]
    return app


def django_app() -> Any:
    """Django, whose patterns allow a trailing slash."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpRequest, HttpResponse
    from django.urls import re_path

    def execute(request: HttpRequest) -> HttpResponse:
        if request.method != "POST":
            return HttpResponse(status=405)
        return HttpResponse(executed(request.headers, request.body))

    urls = type("urls", (), {"urlpatterns": [re_path(rf"^{path[1:]}/?$", execute) for path in PATHS]})
    settings.configure(
        ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], USE_X_FORWARDED_HOST=True, SECRET_KEY="of a test", USE_TZ=True
    )
    return get_wsgi_application()
