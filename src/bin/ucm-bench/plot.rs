//! Line charts as SVG text: a grid of small panels with a logarithmic x axis (powers of two) and y from 0.

#![forbid(unsafe_code)]

use plotters::prelude::*;

/// Pixels of one panel.
const PANEL: (u32, u32) = (430, 310);
/// Colours that stay apart for the colour-blind (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// One line of a chart.
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// x (above 0) and y, by rising x.
    pub points: Vec<(f64, f64)>,
}

/// One panel.
pub struct Chart {
    /// Heading.
    pub title: String,
    /// Under the x axis.
    pub x_label: String,
    /// Beside the y axis.
    pub y_label: String,
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// Draws panels in rows of `columns`.
pub fn draw(charts: &[Chart], columns: usize) -> Result<String, String> {
    if charts.is_empty() {
        return Err("nothing to draw: no run ended".into());
    }
    let rows = charts.len().div_ceil(columns);
    let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(|error| error.to_string())?;
        let panels = root.split_evenly((rows, columns));
        for (chart, panel) in charts.iter().zip(&panels) {
            draw_panel(chart, panel).map_err(|error| error.to_string())?;
        }
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

type Panel<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Failure = Box<dyn std::error::Error>;

fn draw_panel<'a>(chart: &Chart, panel: &Panel<'a>) -> Result<(), Failure>
where
    SVGBackend<'a>: DrawingBackend<ErrorType: 'static>,
{
    let points = || chart.lines.iter().flat_map(|line| line.points.iter());
    // The axis counts doublings, so that depths 1, 2, 4 .. lie at even gaps.
    let x_max = points().map(|(x, _)| x.log2()).fold(1.0, f64::max);
    let y_top = points().map(|(_, y)| *y).fold(0.0, f64::max).max(1e-9);
    // Room above the lines for the legend, whose height grows with their number.
    let y_max = y_top * (1.1 + 0.1 * chart.lines.len() as f64);
    let mut context = ChartBuilder::on(panel)
        .caption(&chart.title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(-0.15..x_max + 0.15, 0.0..y_max)?;
    context
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(&chart.x_label)
        .y_desc(&chart.y_label)
        .x_labels(x_max.round() as usize + 1)
        .x_label_formatter(&|x| {
            if (x - x.round()).abs() < 1e-6 { format!("{:.0}", x.exp2()) } else { String::new() }
        })
        .y_label_formatter(&|y| {
            if y_max < 1.0 { format!("{y:.3}") } else { format!("{y:.1}") }
        })
        .draw()?;
    for (number, line) in chart.lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points: Vec<(f64, f64)> = line.points.iter().map(|(x, y)| (x.log2(), *y)).collect();
        context
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        context.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
    }
    context
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 11))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the drawing holds every title, every line's name and nothing that is not a number.
    #[test]
    fn draws_all() {
        let line = |name: &str| Line {
            name: name.into(),
            points: vec![(1.0, 0.5), (4.0, 1.5), (32.0, 2.0)],
        };
        let chart = |title: &str| Chart {
            title: title.into(),
            x_label: "depth".into(),
            y_label: "GB/s".into(),
            lines: vec![line("64 KiB"), line("1 MiB")],
        };
        let svg = draw(&[chart("first"), chart("second")], 2).unwrap();
        for text in ["first", "second", "64 KiB", "1 MiB", "GB/s"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(draw(&[], 2).is_err());
    }
}
