"""A downloadable file, and those of the speaker experiment's voices, with their licences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One downloadable file; `file` and `sha256` are those this code was written with."""

    name: str
    file: str
    sha256: str
    deb: bool = True

    @property
    def pattern(self) -> str:
        return f"{self.name}_*.deb" if self.deb else self.file


VOICE_PACKAGES = (
    Package(  # CC BY-SA 3.0, a voice of The IVR Voice
        "asterisk-core-sounds-ru-g722",
        "asterisk-core-sounds-ru-g722_1.6.1-1_all.deb",
        "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
    ),
    Package(  # CC BY-SA 3.0, Marco Menardi and Paola Dal Zot, http://www.voip.ammdomus.it
        "asterisk-prompt-it-menardi-wav",
        "asterisk-prompt-it-menardi-wav_1%3a1.4.22+mm20110907-3.1_all.deb",
        "3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
    ),
    Package(  # GPL-2, July E. Jiménez
        "asterisk-prompt-es-co",
        "asterisk-prompt-es-co_0.20070403-2.1_all.deb",
        "6702696e045514699e87dc8fb70f370717e5df91f821f7bec8dd0df1be008e83",
    ),
    Package(  # BSD-3-Clause, Armelle Desjardins
        "asterisk-prompt-fr-armelle",
        "asterisk-prompt-fr-armelle_20070613-2.2_all.deb",
        "162570b1a9b3512a98f06b89f60c7c17cf1b9b52297315adca9a4e5be728bea3",
    ),
    Package(  # GPL-2+, KDE's translators
        "ktuberling-data",
        "ktuberling-data_4%3a22.12.3-1_all.deb",
        "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed",
    ),
    Package(  # GPL-2+, the actors of Fish Fillets - Next Generation
        "fillets-ng-data-cs",
        "fillets-ng-data-cs_1.0.1-1.1_all.deb",
        "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    ),
    Package(
        "fillets-ng-data-nl",
        "fillets-ng-data-nl_1.0.1-1.1_all.deb",
        "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
    ),
)
VOICE_FOLDERS = {  # path under usr/share in the packages -> name in the part
    "asterisk/sounds/ru_RU_f_IvrvoiceRU": "asterisk-ru",
    "asterisk/sounds/it_IT_f_Menardi": "asterisk-it-menardi",
    "asterisk/sounds/es": "asterisk-es-co",
    "asterisk/sounds/fr": "asterisk-fr-armelle",
    "ktuberling/sounds": "ktuberling",
    "games/fillets-ng/sound": "fillets",
}
