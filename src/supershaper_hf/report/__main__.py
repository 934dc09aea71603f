"""Run `python -m supershaper_hf.report FOLDER`: make the page of a search again from its files."""

from .page import main


main()
