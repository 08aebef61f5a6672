"""For mkdocs: a link to a file of the repository that is no page of the site becomes that file's name, if it exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown, page, **_):
    def name(match):
        target = (Path(page.file.abs_src_path).parent / match[2].partition("#")[0]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}, which does not exist")
        if target.is_relative_to(ROOT / "docs") and target.is_file():
            return match[0]
        return f"{match[1]} (`{target.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", name, markdown)
